"""export: BD-Merging's merged models, each as one artefact that `bd_core` alone can run."""

from pathlib import Path
from typing import ClassVar

from pipeline.config import Spec
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.fitted_router import load_router
from pipeline.stages.merged_files import recipe_of, write_routed
from pipeline.stages.model_card import write_model_card
from pipeline.stages.models import Experts

BD_TITLES = {"task": "BD-Merging (task-wise)", "layer": "BD-Merging (layer-wise)"}
BD_PREFIX = "bd_"


class ExportSpec(Spec):
    """Nothing can be set: the variants follow from `fit_router.variants`."""


class Export(Stage):
    """Makes one artefact a fitted router."""

    name: ClassVar[str] = "export"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("base", "experts", "fit_head", "fit_router")
    what: ClassVar[str] = "write the merged models"
    spec: ExportSpec

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit a router."""
        models = (*inputs["base"], *inputs["experts"], *inputs["fit_head"])
        return [
            Unit(
                f"{BD_PREFIX}{router.unit}",
                inputs=(*models, router),
                settings={"method": f"{BD_PREFIX}{router.unit}"},
            )
            for router in inputs["fit_router"]
        ]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write the artefact: base, task vectors, router, head, `recipe.json` and a model card."""
        experts = Experts.of(unit.inputs)
        (fitted,) = unit.of("fit_router")
        router, config = load_router(fitted)
        recipe = recipe_of(unit, BD_TITLES[fitted.unit]) | {"router": config, "group_of": experts.groups.index}
        if config["n_groups"] == 1:
            recipe["group_of"] = dict.fromkeys(experts.groups.index, 0)
        write_routed(out_dir, experts.base_state, experts.vectors(), router, recipe)
        head = unit.one("fit_head")
        for name, kept in (("model.safetensors", "head.safetensors"), ("config.json", "head.json")):
            (out_dir / kept).write_bytes(head.file(name).read_bytes())
        write_model_card(out_dir, unit)
        return StageReport(rows_in=experts.count, rows_out=experts.count)
