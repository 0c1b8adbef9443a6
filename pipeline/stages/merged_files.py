"""Merged models as files: what `baselines` and `export` write, what `evaluate` opens, what runs without the pipeline.

Shape letters: K experts, G layer groups.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bd_core.merged import MergedModel
from bd_core.task_vectors import TaskVectors
from pipeline.backbones.open_clip import Backbone
from pipeline.formats.checkpoints import write_safetensors
from pipeline.stage import Unit
from pipeline.stages.fitted_router import router_from
from pipeline.stages.models import VISUAL
from pipeline.stages.predictors import Individual, Predictor, Routed, Static
from pipeline.store import Artefact

MERGED = ("baselines", "export")  # the stages whose units are merged models
REFERENCES = {"pretrained": "Pretrained", "experts": "Individual experts"}


@dataclass(frozen=True)
class Merged:
    """A model under test with what the tables say of it."""

    title: str
    predictor: Predictor
    routed: bool
    groups: list[str]
    experts: list[str]
    cost: dict[str, Any]


def write_static(directory: Path, state: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> None:
    """Write one merged image tower and its recipe."""
    write_safetensors(directory / VISUAL, state)
    write_recipe(directory, {"kind": "static", **recipe})


def write_routed(
    directory: Path,
    base: Mapping[str, Tensor],
    vectors: TaskVectors,
    router: nn.Module,
    recipe: Mapping[str, Any],
) -> None:
    """Write theta_0, the K task vectors stacked along the first axis, the router and the recipe."""
    write_safetensors(directory / "base.safetensors", base)
    write_safetensors(directory / "task_vectors.safetensors", vectors.vectors)
    write_safetensors(directory / "router.safetensors", router.state_dict())
    write_recipe(directory, {"kind": "routed", **recipe})


def recipe_of(unit: Unit, title: str) -> dict[str, Any]:
    """What every `recipe.json` begins with: the method, its parameters, and what it was made from."""
    return {
        "method": unit.settings["method"],
        "parameters": unit.settings.get("parameters", {}),
        "title": title,
        "made_from": {f"{a.stage}/{a.unit}": a.digest for a in unit.inputs if a.stage in ("base", "experts")},
    }


def write_recipe(directory: Path, recipe: Mapping[str, Any]) -> None:
    """Write `recipe.json`."""
    (directory / "recipe.json").write_text(json.dumps(recipe, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def open_merged(unit: Unit, backbone: Backbone, device: torch.device) -> Merged:
    """The model that an evaluate unit is about, on `device`."""
    n_base = sum(p.numel() for p in backbone.visual.parameters())
    if unit.id == "pretrained":
        return _reference(unit.id, Static(backbone, backbone.visual.to(device)), n_base, n_base)
    if unit.id == "experts":
        towers = {a.unit: _tower(backbone, load_file(a.file(VISUAL)), device) for a in unit.of("experts")}
        return _reference(unit.id, Individual(backbone, towers), n_base, n_base * len(towers))
    directory = merged_model(unit).path
    recipe = json.loads((directory / "recipe.json").read_text(encoding="utf-8"))
    if recipe["kind"] == "static":
        tower = _tower(backbone, load_file(directory / VISUAL), device)
        return _merged(recipe, Static(backbone, tower), n_base, n_base)
    base = load_file(directory / "base.safetensors")
    vectors = TaskVectors(
        load_file(directory / "task_vectors.safetensors"),
        {name: value for name, value in base.items() if not value.is_floating_point()},
    )
    merged = MergedModel(backbone.visual, base, vectors, groups=recipe["group_of"]).to(device)
    router = router_from(recipe["router"], load_file(directory / "router.safetensors")).to(device)
    n_router = sum(p.numel() for p in router.parameters())
    n_vectors = sum(stacked.numel() for stacked in vectors.vectors.values())
    # The pretrained tower runs too, for the router's tokens; where it is not the base, it is extra.
    return _merged(recipe, Routed(backbone, merged, router), n_base, n_base + n_vectors + n_router)


def merged_model(unit: Unit) -> Artefact:
    """The merged model among a unit's inputs."""
    (found,) = (artefact for artefact in unit.inputs if artefact.stage in MERGED)
    return found


def _tower(backbone: Backbone, state: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    tower = copy.deepcopy(backbone.visual)
    tower.load_state_dict(dict(state))
    return tower.to(device).eval()


def _reference(name: str, predictor: Predictor, n_base: int, n_all: int) -> Merged:
    return Merged(REFERENCES[name], predictor, False, [], [], _cost(n_base, n_all, dynamic=False))


def _merged(recipe: Mapping[str, Any], predictor: Predictor, n_base: int, n_all: int) -> Merged:
    dynamic = recipe["kind"] == "routed"
    router = recipe.get("router", {})
    groups, experts = router.get("groups", []), router.get("experts", [])
    return Merged(recipe["title"], predictor, dynamic, groups, experts, _cost(n_base, n_all, dynamic))


def _cost(n_base: int, n_all: int, dynamic: bool) -> dict[str, Any]:
    return {"parameters": n_all, "extra_parameters": n_all - n_base, "dynamic": dynamic}
