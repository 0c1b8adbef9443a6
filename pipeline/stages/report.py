"""report: the page, the pictures and the numbers of a run, each number with the stored unit it came from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from pipeline.config import Resources, Spec
from pipeline.stage import Inputs, Stage, StageReport, Unit

# What a report cannot do without. The other stages may be missing: their sections then say so.
REQUIRED = "evaluate"


class ReportSpec(Spec):
    """A report shows what is there."""

    dark: bool = Field(default=True, description="draw every figure for dark screens too; half of the drawing time")


class Report(Stage):
    """Writes `report.html` (self-contained), `figures/*.png` and `report.json`.

    `timing` (rows of the run record) and `about` (`run_id`, `name`, `config`, `git`, `versions`, ...) are shown and not
    hashed: a report is made again when a result changes, not when a clock does. Both may still be filled after `units`.
    """

    name: ClassVar[str] = "report"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = (
        "shard",
        "base",
        "experts",
        "embed",
        "fit_head",
        "radius",
        "edges",
        "neighbours",
        "score",
        "threshold",
        "pairs",
        "activations",
        "baselines",
        "surgery",
        "fit_router",
        "export",
        "corrupt",
        "evaluate",
        "detect",
    )
    what: ClassVar[str] = "write the report"
    spec: ReportSpec

    def __init__(
        self,
        spec: Spec,
        resources: Resources | None = None,
        seed: int | None = None,
        *,
        timing: Sequence[Mapping[str, Any]] = (),
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(spec, resources, seed)
        self.timing = timing
        self.about = about if about is not None else {}

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit, over everything that was committed."""
        assert inputs.get(REQUIRED), "the flow gives every report at least one evaluated model"
        artefacts = tuple(artefact for stage in self.needs for artefact in inputs.get(stage, ()))
        return [Unit("report", inputs=artefacts, payload={"timing": self.timing, "about": self.about})]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Read the inputs, draw, write."""
        # Imported here: matplotlib costs half a second that no other command should pay.
        from pipeline.reporting import build_report

        report = StageReport(rows_in=len(unit.inputs), rows_out=len(unit.inputs))
        run = {**unit.payload["about"], "timing": unit.payload["timing"]}
        with report.span("draw"):
            built = build_report({stage: unit.of(stage) for stage in self.needs}, run, dark=self.spec.dark)
        (out_dir / "figures").mkdir()
        for name, png in built.figures.items():
            (out_dir / "figures" / f"{name}.png").write_bytes(png)
        (out_dir / "report.html").write_text(built.html, encoding="utf-8")
        (out_dir / "report.json").write_text(built.json, encoding="utf-8")
        report.metrics = built.metrics
        return report
