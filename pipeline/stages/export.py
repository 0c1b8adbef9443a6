"""export: BD-Merging's merged models, each as one artefact that `bd_core` alone can run."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from bd_core.merged import MergedModel
from bd_core.router import Router
from pipeline.config import Spec
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.fitted_router import load_router
from pipeline.stages.merged_files import read_recipe, recipe_of, write_routed, write_static
from pipeline.stages.model_card import write_model_card
from pipeline.stages.models import Experts, open_backbone
from pipeline.stages.pool import Pool
from pipeline.stages.task_vector_files import DenseSpec, VectorsSpec, bytes_per_expert
from pipeline.store import Artefact

BD_TITLES = {"task": "BD-Merging (task-wise)", "layer": "BD-Merging (layer-wise)"}
BD_PREFIX = "bd_"
STATIC = "_static"
NEED = "unlabelled batches"
TOKENS_A_BATCH = 4096  # fixed, so that no option of speed changes the last bit of a mean


class ExportSpec(Spec):
    """In which form the merged models are kept; which there are follows from `fit_router.variants`."""

    vectors: VectorsSpec = Field(
        default=DenseSpec(),
        discriminator="kind",
        description="how task vectors are stored: whole, or cut by SVD (low_rank); float32 or bfloat16",
    )
    static: bool = Field(
        default=False,
        description="also one plain model a router, merged with its mean weights over the auxiliary images",
    )


class Export(Stage):
    """Makes one artefact a fitted router, and a plain one beside it where that is asked for."""

    name: ClassVar[str] = "export"
    version: ClassVar[int] = 3
    needs: ClassVar[tuple[str, ...]] = ("base", "experts", "embed", "fit_head", "fit_router")
    what: ClassVar[str] = "write the merged models"
    spec: ExportSpec

    def hashed_spec(self) -> dict[str, Any]:
        """Nothing: a routed unit's settings name how its vectors are stored, a static one's that it is static."""
        return {}

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit a router, or two."""
        models = (*inputs["base"], *inputs["experts"])
        stored = {} if self.spec.vectors == DenseSpec() else {"vectors": self.spec.vectors.model_dump(mode="json")}
        units = []
        for router in inputs["fit_router"]:
            name = f"{BD_PREFIX}{router.unit}"
            routed = (*models, *inputs["fit_head"], router)
            units.append(Unit(name, inputs=routed, settings={"method": name, **stored}))
            if self.spec.static:
                averaged = (*models, *inputs["embed"], router)
                units.append(Unit(name + STATIC, inputs=averaged, settings={"method": name + STATIC}))
        return units

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write the artefact: base, task vectors, router, head, or one tower; `recipe.json` and a model card."""
        experts = Experts.of(unit.inputs)
        (fitted,) = unit.of("fit_router")
        router, config = load_router(fitted)
        group_of = experts.groups.index
        if config["n_groups"] == 1:
            group_of = dict.fromkeys(group_of, 0)
        report = StageReport(rows_in=experts.count, rows_out=experts.count)
        if unit.id.endswith(STATIC):
            recipe = recipe_of(unit, f"{BD_TITLES[fitted.unit]}, static", NEED)
            self._static(unit, experts, router, group_of, recipe | {"averaged_router": config}, out_dir)
        else:
            recipe = recipe_of(unit, BD_TITLES[fitted.unit], NEED) | {"router": config, "group_of": group_of}
            write_routed(out_dir, experts.base_state, experts.vectors(), router, recipe, self.spec.vectors)
            _copy_head(unit.one("fit_head"), out_dir)
            report.metrics = _storage(out_dir, experts.count)
        write_model_card(out_dir, unit)
        return report

    def _static(
        self,
        unit: Unit,
        experts: Experts,
        router: Router,
        group_of: dict[str, int],
        recipe: dict[str, Any],
        out_dir: Path,
    ) -> None:
        backbone = open_backbone(unit.one("base"))
        weights_BGK = _weights(router, Pool.of(unit.inputs).tokens())
        merged = MergedModel(backbone.visual, experts.base_state, experts.vectors(), groups=group_of)
        write_static(out_dir, merged.static_state(weights_BGK), recipe | {"mean_weights": weights_BGK.mean(0).tolist()})


@torch.inference_mode()
def _weights(router: Router, tokens_NW: torch.Tensor) -> torch.Tensor:
    return torch.cat([router(part) for part in torch.split(tokens_NW, TOKENS_A_BATCH)])


def _copy_head(head: Artefact, directory: Path) -> None:
    for name, kept in (("model.safetensors", "head.safetensors"), ("config.json", "head.json")):
        (directory / kept).write_bytes(head.file(name).read_bytes())


def _storage(directory: Path, n_experts: int) -> dict[str, float]:
    """What an expert takes on disk, and what was lost by it."""
    kept = read_recipe(directory).get("vectors", {})
    lost = {name: kept[name] for name in ("relative_error_mean", "relative_error_max") if name in kept}
    return {"bytes_per_expert": float(bytes_per_expert(directory, n_experts)), **lost}
