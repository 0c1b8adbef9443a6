"""mergekit on plain state dicts. Runs in an environment of its own, never one of the project's.

python3.11 -m venv peers-mergekit
peers-mergekit/bin/pip install torch==2.13.0
peers-mergekit/bin/pip install mergekit==0.1.5
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

PACKAGE = "mergekit"
VERSION = version(PACKAGE)
# Our method's name: the peer's method and the parameters that mean our defaults. `weight` stands for our scale.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "weight_average": ("linear", {"weight": 1.0}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.3}),
    "ties": ("ties", {"weight": 0.3, "density": 0.2, "normalize": False}),
    "dare": ("dare_linear", {"weight": 0.6, "density": 0.5, "rescale": False}),
    "dare_ties": ("dare_ties", {"weight": 0.6, "density": 0.5, "rescale": False}),
    "model_stock": ("model_stock", {}),
}
WITHOUT_BASE = ("linear",)


def prepared(
    method: str, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], **parameters: Any
) -> Callable[[], dict[str, Tensor]]:
    """One merge, ready to be called; the inputs are left as they are."""
    from mergekit.merge_methods.api import merge_state_dicts

    name, defaults = METHODS[method]
    models: dict[str, Mapping[str, Tensor]] = {f"expert{k}": expert for k, expert in enumerate(experts)}
    if name not in WITHOUT_BASE:
        models = {"base": base, **models}
    origin = None if name in WITHOUT_BASE else "base"

    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            found: dict[str, Tensor] = merge_state_dicts(models, name, parameters=defaults | parameters, base=origin)
        return found

    return run


def merged(
    method: str, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], **parameters: Any
) -> dict[str, Tensor]:
    """The merged state dict."""
    return prepared(method, base, experts, **parameters)()
