"""A fitted router: what it is made of, read back from its files."""

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from bd_core.router import Router
from pipeline.store import Artefact


def load_router(artefact: Artefact) -> tuple[Router, dict[str, Any]]:
    """The router of a fit_router unit, ready to route, and its configuration."""
    config: dict[str, Any] = json.loads(artefact.file("config.json").read_text(encoding="utf-8"))
    return router_from(config, load_file(artefact.file("model.safetensors"))), config


def router_from(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Router:
    """A router of this configuration, holding `state`."""
    router = Router(
        config["width"],
        len(config["experts"]),
        n_groups=config["n_groups"],
        hidden=config["hidden"],
        kind=config["kind"],
        null_expert=config["null_expert"],
        output=config.get("output", "softmax"),
    )
    router.load_state_dict(dict(state))
    return router.eval()
