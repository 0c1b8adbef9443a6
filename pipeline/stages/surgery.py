"""surgery: a merged model whose features are corrected, task by task, by small modules fitted on unlabelled images."""

from pathlib import Path
from typing import Any, ClassVar, get_args

from safetensors.torch import load_file

from bd_core.methods.registry import Need
from pipeline.formats.checkpoints import write_safetensors
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.baselines import settings_of
from pipeline.stages.cost import watched
from pipeline.stages.merged_files import SURGERY, read_recipe, recipe_of, write_static
from pipeline.stages.method_inputs import MethodInputs
from pipeline.stages.method_list import BaselinesSpec, entry_of
from pipeline.stages.model_card import write_model_card
from pipeline.stages.models import VISUAL, Experts
from pipeline.stages.shard import of_split
from pipeline.training.history import write_history


class Surgery(Stage):
    """Makes one artefact for each configured row of Representation Surgery, after the row it names."""

    name: ClassVar[str] = "surgery"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("shard", "base", "experts", "embed", "baselines")
    what: ClassVar[str] = "correct a merged model's features"
    spec: BaselinesSpec

    def hashed_spec(self) -> dict[str, Any]:
        """Nothing: every unit's settings name its parameters."""
        return {}

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit a row; none as a rule."""
        train = of_split(inputs["shard"], "train")
        made = {artefact.unit: artefact for artefact in inputs["baselines"]}
        return [
            Unit(
                entry.name,
                (*inputs["base"], *inputs["experts"], *inputs["embed"], made[entry.options["after"]]),
                settings_of(entry, self.seed or 0) | {"batch_per_task": self.spec.batch_per_task},
                payload=train,
            )
            for entry in self.spec.entries()
            if "after" in entry.options
        ]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write the merged tower as it was, the modules, `recipe.json` and a model card."""
        experts, on = Experts.of(unit.inputs), unit.of("baselines")[0]
        report = StageReport(rows_in=experts.count, rows_out=experts.count)
        entry = entry_of(unit.id, self.spec.methods[unit.id])
        beneath = read_recipe(on.path)
        needs: tuple[str, ...] = get_args(Need)  # rising: what lies beneath may have been told more
        need = max(entry.need, beneath["need"], key=needs.index)
        recipe = recipe_of(unit, f"{beneath['title']} + Surgery", need)
        with MethodInputs(unit, experts, self.seed or 0) as inputs, watched(report, "forward_backward"):
            found = entry.method.function(
                experts.base_state,
                experts.states,
                merged=load_file(on.file(VISUAL)),
                **inputs.given(entry.data),
                **unit.settings["parameters"],
            )
        write_static(out_dir, found.merged, recipe | {"kind": SURGERY, "tasks": list(found.module.tasks)})
        write_safetensors(out_dir / f"{SURGERY}.safetensors", found.module.state_dict())
        write_history(out_dir / "history.parquet", [{"step": i, "loss": v} for i, v in enumerate(found.history)])
        write_model_card(out_dir, unit)
        return report
