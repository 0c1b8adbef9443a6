"""One method's work: what its runner is handed, whatever the method needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.stage import StageReport, Unit
from pipeline.stages.method_inputs import MethodInputs
from pipeline.stages.method_list import Entry
from pipeline.stages.models import Experts


@dataclass(frozen=True)
class Job:
    """`entry` is what to do, `experts` and `inputs` what with, `directory`, `recipe` and `report` where it goes."""

    entry: Entry
    unit: Unit
    experts: Experts
    inputs: MethodInputs
    recipe: dict[str, Any]
    directory: Path
    report: StageReport
    seed: int

    @property
    def parameters(self) -> dict[str, Any]:
        """The method's settings, as the artefact's recipe holds them."""
        parameters: dict[str, Any] = self.unit.settings["parameters"]
        return parameters

    @property
    def options(self) -> dict[str, Any]:
        """What the runner itself is told, beside the method's function."""
        options: dict[str, Any] = self.unit.settings["options"]
        return options
