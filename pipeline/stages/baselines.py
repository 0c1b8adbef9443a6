"""baselines: every method that BD-Merging is compared with, each merged into one artefact."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator

from bd_core.methods import METHODS, merge, twin_merging
from bd_core.methods.adamerging import check_settings as check_adamerging
from bd_core.methods.registry import check_parameters, find_method
from pipeline.config import Spec
from pipeline.formats.checkpoints import write_safetensors
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.fit_head import class_heads
from pipeline.stages.fit_router import task_rows
from pipeline.stages.images import PoolImages
from pipeline.stages.learned import fit_adamerging, fit_twin_router
from pipeline.stages.merged_files import recipe_of, write_routed, write_static
from pipeline.stages.model_card import PRETRAINED, write_model_card
from pipeline.stages.models import Experts, open_backbone
from pipeline.stages.pool import Pool
from pipeline.stages.shard import of_split
from pipeline.store import Store
from pipeline.training.context import LocalContext
from pipeline.training.history import write_history

LEARNED = {"adamerging", "twin_merging"}
DEFAULT_METHODS: dict[str, dict[str, Any]] = {
    "weight_average": {},
    "task_arithmetic": {},
    "ties": {},
    "adamerging": {},
    "twin_merging": {},
}


class BaselinesSpec(Spec):
    """The methods beside BD-Merging, by name with their parameters."""

    methods: dict[str, dict[str, Any]] = Field(default=DEFAULT_METHODS, description="{name: {parameter: value}}")
    batch_per_task: int = Field(default=16, ge=1, description="of AdaMerging; the released code's")

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, parameters in methods.items():
            method = find_method(METHODS, name)
            given = {"logits": None, "batches": None} if name == "adamerging" else {}
            check_parameters(method, {**given, **parameters})
            # `1` means `1.0` where a number with a fraction is asked for, and counts as the same.
            for parameter, default in method.defaults.items():
                if isinstance(default, float) and type(parameters.get(parameter)) is int:
                    parameters[parameter] = float(parameters[parameter])
            _try(name, parameters)
        return methods


class Baselines(Stage):
    """Makes one artefact a method. Depends on no fit of BD-Merging, so it can run beside them."""

    name: ClassVar[str] = "baselines"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("shard", "base", "experts", "embed")
    what: ClassVar[str] = "merge with every method to compare with"
    spec: BaselinesSpec

    def hashed_spec(self) -> dict[str, Any]:
        """Nothing: every unit's settings name its method and parameters."""
        return {}

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit a method, the learned ones first since they take longest."""
        models = (*inputs["base"], *inputs["experts"])
        train = of_split(inputs["shard"], "train")
        units = []
        for name, parameters in sorted(self.spec.methods.items(), key=lambda item: item[0] not in LEARNED):
            settings: dict[str, Any] = {"method": name, "parameters": parameters}
            if name not in LEARNED:
                units.append(Unit(name, inputs=models, settings=settings))
                continue
            settings |= {"seed": self.seed, "batch_per_task": self.spec.batch_per_task}
            units.append(Unit(name, inputs=(*models, *inputs["embed"]), settings=settings, payload=train))
        return units

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write the artefact: weights, `recipe.json` and a model card."""
        experts = Experts.of(unit.inputs)
        report = StageReport(rows_in=experts.count, rows_out=experts.count)
        method = unit.settings["method"]
        with report.span("forward_backward" if method in LEARNED else "merge"):
            if method == "adamerging":
                self._adamerging(unit, experts, out_dir, report)
            elif method == "twin_merging":
                self._twin_merging(unit, experts, out_dir, report)
            else:
                merged = merge(method, experts.base_state, experts.states, **unit.settings["parameters"])
                write_static(out_dir, merged, recipe_of(unit, METHODS[method].title))
        write_model_card(out_dir, unit)
        return report

    def _adamerging(self, unit: Unit, experts: Experts, out_dir: Path, report: StageReport) -> None:
        pool = Pool.of(unit.inputs)
        backbone = open_backbone(unit.one("base"))
        with PoolImages(unit.payload, pool, backbone) as images:
            found = fit_adamerging(
                backbone,
                experts,
                class_heads(unit.one("base")),
                images,
                dict(zip(experts.tasks, task_rows(pool.tasks(), experts.tasks), strict=True)),
                seed=self.seed or 0,
                batch_per_task=self.spec.batch_per_task,
                parameters=unit.settings["parameters"],
            )
        report.metrics = {"steps": float(len(found.history)), "converged": float(found.converged)}
        write_static(out_dir, found.merged, recipe_of(unit, METHODS["adamerging"].title))
        write_history(out_dir / "history.parquet", [{"step": i, "loss": v} for i, v in enumerate(found.history)])

    def _twin_merging(self, unit: Unit, experts: Experts, out_dir: Path, report: StageReport) -> None:
        pool = Pool.of(unit.inputs)
        parts = twin_merging(experts.base_state, experts.states, **unit.settings["parameters"])
        router, history = fit_twin_router(
            pool.tokens(),
            [experts.tasks.index(task) for task in pool.tasks()],
            experts.count,
            seed=self.seed or 0,
            context=LocalContext(Store.state_beside(out_dir)),
        )
        config = {
            "width": router.width,
            "experts": list(experts.tasks),
            "n_groups": 1,
            "groups": ["all layers"],
            "hidden": None,
            "kind": "mlp",
            "null_expert": False,
        }
        recipe = recipe_of(unit, METHODS["twin_merging"].title) | {
            "router": config,
            "group_of": dict.fromkeys(experts.groups.index, 0),
        }
        report.metrics = {"router_task_accuracy": history[-1]["task_accuracy"]}
        # Its vectors are added to a shared model, and its router reads the tokens of theta_0.
        write_safetensors(out_dir / PRETRAINED, experts.base_state)
        write_routed(out_dir, parts.shared, parts.exclusive.expanded(), router, recipe)
        write_history(out_dir / "history.parquet", history)


def _try(name: str, parameters: Mapping[str, Any]) -> None:
    """Merge two models of four numbers, so that a value out of range is told before the first image is read."""
    base, experts = {"weight": torch.eye(2)}, [{"weight": torch.ones(2, 2)}, {"weight": -torch.ones(2, 2)}]
    try:
        if name == "adamerging":
            # Not even one step of it: torch takes seconds to load what an optimiser needs, and `plan` waits for this.
            check_adamerging(**parameters)
        else:
            METHODS[name].function(base, experts, **parameters)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} with {dict(parameters)}: {error}; correct it") from None
