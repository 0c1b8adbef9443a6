"""baselines: every method that BD-Merging is compared with, each merged into one artefact."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from bd_core.methods import merge
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.cost import watched
from pipeline.stages.job import Job
from pipeline.stages.learned import fit_coefficients, twin, wemoe_gates
from pipeline.stages.merged_files import recipe_of, write_static
from pipeline.stages.method_inputs import MethodInputs
from pipeline.stages.method_list import BaselinesSpec, Entry, entry_of
from pipeline.stages.model_card import write_model_card
from pipeline.stages.models import Experts
from pipeline.stages.search import bayesian, pareto
from pipeline.stages.shard import of_split


class Baselines(Stage):
    """Makes one artefact a method. Depends on no fit of BD-Merging, so it can run beside them."""

    name: ClassVar[str] = "baselines"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("shard", "base", "experts", "embed", "activations")
    what: ClassVar[str] = "merge with every method to compare with"
    spec: BaselinesSpec

    def hashed_spec(self) -> dict[str, Any]:
        """Nothing: every unit's settings name its method and parameters."""
        return {}

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit a method, those that learn first since they take longest; each with what it needs and no more."""
        train = of_split(inputs["shard"], "train")
        units = []
        entries = [entry for entry in self.spec.entries() if "after" not in entry.options]
        for entry in sorted(entries, key=lambda entry: not entry.uses_images):
            settings = settings_of(entry, self.seed or 0)
            given = [*inputs["base"], *inputs["experts"]]
            if entry.uses_activations:
                given += inputs["activations"]
            if entry.uses_images:
                given += inputs["embed"]
                settings |= {"seed": self.seed, "batch_per_task": self.spec.batch_per_task}
            if entry.uses_labels:
                # Part of the key, unlike where shards are read for their images only.
                given += train
                settings["validation_per_task"] = self.spec.validation_per_task
            units.append(Unit(entry.name, tuple(given), settings, payload=train if entry.uses_images else None))
        return units

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write the artefact: weights, `recipe.json` and a model card."""
        experts = Experts.of(unit.inputs)
        report = StageReport(rows_in=experts.count, rows_out=experts.count)
        entry = entry_of(unit.id, self.spec.methods[unit.id])
        recipe = recipe_of(unit, entry.title, entry.need)
        with MethodInputs(unit, experts, self.seed or 0) as inputs:
            job = Job(entry, unit, experts, inputs, recipe, out_dir, report, self.seed or 0)
            RUNNERS.get(entry.method.name, merge_state)(job)
        write_model_card(out_dir, unit)
        return report


def merge_state(job: Job) -> None:
    """Any method that gives one state dict, with whatever data it declares."""
    given = job.inputs.given(job.entry.data)
    with watched(job.report, "merge"):
        merged = merge(job.entry.method.name, job.experts.base_state, job.experts.states, **job.parameters, **given)
    write_static(job.directory, merged, job.recipe)


def settings_of(entry: Entry, seed: int) -> dict[str, Any]:
    """What tells a row's unit from its siblings; what a method draws, it draws from the run's seed unless told."""
    drawn = {"seed": seed} if "seed" in entry.method.defaults else {}
    return {
        "method": entry.method.name,
        "parameters": drawn | dict(entry.parameters),
        "options": dict(entry.options),
    }


RUNNERS: dict[str, Callable[[Job], None]] = {
    "adamerging": fit_coefficients,
    "twin_merging": twin,
    "wemoe": wemoe_gates,
    "map": pareto,
    "bmm": bayesian,
}
