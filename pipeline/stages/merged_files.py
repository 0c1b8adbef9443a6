"""Merged models as files: what `baselines` and `export` write, what `evaluate` opens, what runs without the pipeline.

Shape letters: K experts, G layer groups.
"""

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bd_core.compression import CompressedVectors
from bd_core.merged import MergedModel
from bd_core.methods.surgery import Surgery
from bd_core.task_vectors import TaskVectors
from pipeline import logs
from pipeline.backbones.open_clip import Backbone
from pipeline.formats.checkpoints import write_safetensors
from pipeline.stage import Unit
from pipeline.stages.fitted_router import router_from
from pipeline.stages.models import VISUAL, Experts
from pipeline.stages.predictors import Corrected, Individual, Predictor, Routed, Static
from pipeline.stages.task_vector_files import (
    DenseSpec,
    VectorsSpec,
    bytes_per_expert,
    held_dtype,
    read_task_vectors,
    write_task_vectors,
)
from pipeline.store import Artefact

MERGED = ("baselines", "surgery", "export")  # the stages whose units are merged models
SURGERY = "surgery"  # the kind of an artefact whose features are corrected for a task that must be known
Mode = Literal["exact", "low_rank", "grouped"]
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
    method: dict[str, Any] | None = None  # its name, parameters and need; None: a reference
    task_free: bool = True  # whether it can be run without being told the task
    only: tuple[str, ...] | None = None  # the tasks it can be run on, where not all

    def knows(self, task: str) -> bool:
        """Whether it can be run on the images of this task at all."""
        return self.only is None or task in self.only


def write_static(directory: Path, state: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> None:
    """Write one merged image tower and its recipe."""
    write_safetensors(directory / VISUAL, state)
    write_recipe(directory, {"kind": "static"} | dict(recipe))


def write_routed(
    directory: Path,
    base: Mapping[str, Tensor],
    vectors: TaskVectors,
    router: nn.Module,
    recipe: Mapping[str, Any],
    stored_as: VectorsSpec = DenseSpec(),  # noqa: B008 - frozen
) -> None:
    """Write theta_0, the K task vectors stacked along the first axis, the router and the recipe."""
    write_safetensors(directory / "base.safetensors", base)
    kept = write_task_vectors(directory, vectors, stored_as)
    write_safetensors(directory / "router.safetensors", router.state_dict())
    write_recipe(directory, {"kind": "routed", **recipe} | ({"vectors": kept} if kept else {}))


def recipe_of(unit: Unit, title: str, need: str) -> dict[str, Any]:
    """What every `recipe.json` begins with: the method, its need and parameters, and what it was made from."""
    return {
        "method": unit.settings["method"],
        "need": need,
        "parameters": {**unit.settings.get("parameters", {}), **unit.settings.get("options", {})},
        "title": title,
        "made_from": {f"{a.stage}/{a.unit}": a.digest for a in unit.inputs if a.stage in ("base", "experts")},
    }


def write_recipe(directory: Path, recipe: Mapping[str, Any]) -> None:
    """Write `recipe.json`."""
    (directory / "recipe.json").write_text(json.dumps(recipe, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_recipe(directory: Path) -> dict[str, Any]:
    """What `recipe.json` in `directory` says."""
    recipe: dict[str, Any] = json.loads((directory / "recipe.json").read_text(encoding="utf-8"))
    return recipe


def is_compressed(recipe: Mapping[str, Any]) -> bool:
    """Whether the task vectors are kept in another form than whole in float32."""
    return bool(recipe.get("vectors"))


def open_merged(unit: Unit, backbone: Backbone, device: torch.device, grouped_distance: float | None = None) -> Merged:
    """The model that an evaluate unit is about, on `device`; `grouped_distance` shares merged copies, as MergedModel's.

    Task vectors that were cut stay factors, unless copies are shared.
    """
    n_base = sum(p.numel() for p in backbone.visual.parameters())
    if unit.id == "pretrained":
        return _reference(unit.id, Static(backbone, backbone.visual.to(device)), n_base, n_base)
    if unit.id == "experts":
        towers = {a.unit: _tower(backbone, load_file(a.file(VISUAL)), device) for a in unit.of("experts")}
        found = _reference(unit.id, Individual(backbone, towers), n_base, n_base * len(towers))
        return replace(found, task_free=False, only=tuple(towers))
    if grouped_distance is None:
        return open_directory(merged_model(unit).path, backbone, device)
    return open_directory(merged_model(unit).path, backbone, device, "grouped", grouped_distance)


def open_directory(
    directory: Path, backbone: Backbone, device: torch.device, mode: Mode | None = None, max_distance: float = 0.05
) -> Merged:
    """The merged model whose files lie in `directory`; `backbone` reads tokens and must hold what its router read.

    `mode` and `max_distance` are those of MergedModel; without a mode, as the task vectors are stored.
    """
    recipe = read_recipe(directory)
    n_base = sum(p.numel() for p in backbone.visual.parameters())
    if recipe["kind"] == "static":
        tower = _tower(backbone, load_file(directory / VISUAL), device)
        return _merged(recipe, Static(backbone, tower), _cost(n_base, n_base, dynamic=False))
    if recipe["kind"] == SURGERY:
        tower = _tower(backbone, load_file(directory / VISUAL), device)
        modules = load_file(directory / f"{SURGERY}.safetensors")
        surgery = Surgery(recipe["tasks"], backbone.embed_dim, rank=modules["down"].shape[1])
        surgery.load_state_dict(modules)
        n_all = n_base + sum(value.numel() for value in modules.values())
        cost = _cost(n_base, n_all, dynamic=False)
        found = _merged(recipe, Corrected(backbone, tower, surgery.to(device).eval()), cost)
        return replace(found, task_free=False, only=tuple(recipe["tasks"]))
    base = load_file(directory / "base.safetensors")
    kept = recipe.get("vectors", {})
    vectors = read_task_vectors(directory, kept, base)
    merged = MergedModel(
        backbone.visual,
        base,
        vectors,
        groups=recipe["group_of"],
        mode=mode,
        max_distance=max_distance,
        vectors_dtype=held_dtype(kept),
    ).to(device)
    router = router_from(recipe["router"], load_file(directory / "router.safetensors")).to(device)
    # The pretrained tower runs too, for the router's tokens; where it is not the base, it is extra.
    n_all = n_base + _n_values(vectors) + sum(p.numel() for p in router.parameters())
    cost = _cost(n_base, n_all, dynamic=True) | {"bytes_per_expert": bytes_per_expert(directory, vectors.n_experts)}
    cost["memory_bytes_per_expert"] = merged.bytes_per_expert
    cost |= {name: kept[name] for name in ("relative_error_mean", "relative_error_max") if name in kept}
    return _merged(recipe, Routed(backbone, merged, router), cost)


def uncompressed(unit: Unit, merged: Merged, device: torch.device) -> Merged:
    """`merged` with the experts' own task vectors, exact: what compression is judged against. Equal routing weights."""
    routed, experts = merged.predictor, Experts.of(unit.inputs)
    assert isinstance(routed, Routed)
    exact = MergedModel(
        routed.backbone.visual,
        experts.base_state,
        experts.vectors(),
        groups=read_recipe(merged_model(unit).path)["group_of"],
    )
    return replace(merged, predictor=Routed(routed.backbone, exact.to(device), routed.router))


def tell_fallback(merged: MergedModel, who: str) -> dict[str, Any]:
    """Log once if some of the model has no batched form, which costs time and changes no result; notes for a report."""
    if merged.fallback_reason is None:
        return {}
    logs.fact(f"{who} merges in part through torch.func", level=logging.WARNING, reason=merged.fallback_reason)
    return {"fallback_reason": merged.fallback_reason}


def merged_model(unit: Unit) -> Artefact:
    """The merged model among a unit's inputs."""
    (found,) = (artefact for artefact in unit.inputs if artefact.stage in MERGED)
    return found


def _tower(backbone: Backbone, state: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    tower = copy.deepcopy(backbone.visual)
    tower.load_state_dict(dict(state))
    return tower.to(device).eval()


def _reference(name: str, predictor: Predictor, n_base: int, n_all: int) -> Merged:
    cost = _cost(n_base, n_all, dynamic=False)
    return Merged(REFERENCES[name], predictor, False, [], [], cost)


def _merged(recipe: Mapping[str, Any], predictor: Predictor, cost: dict[str, Any]) -> Merged:
    router = recipe.get("router", {})
    groups, experts = router.get("groups", []), router.get("experts", [])
    method = {name: recipe[name] for name in ("method", "parameters", "need")}
    return Merged(recipe["title"], predictor, recipe["kind"] == "routed", groups, experts, cost, method)


def _n_values(vectors: TaskVectors | CompressedVectors) -> int:
    if isinstance(vectors, TaskVectors):
        return sum(stacked.numel() for stacked in vectors.vectors.values())
    parts = [part for pair in vectors.factors.values() for part in pair]
    return sum(stacked.numel() for stacked in (*vectors.dense.values(), *parts))


def _cost(n_base: int, n_all: int, dynamic: bool) -> dict[str, Any]:
    return {"parameters": n_all, "extra_parameters": n_all - n_base, "dynamic": dynamic}
