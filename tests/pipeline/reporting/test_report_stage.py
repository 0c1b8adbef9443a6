"""The stage around the report: one unit over all that is committed, files below its directory, timing not hashed."""

import json
from pathlib import Path

import pytest
from synthetic_run import TITLES, Synthetic

from pipeline.stages.report import Report, ReportSpec
from pipeline.store import Store


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    left_out = ["base", "experts", "baselines", "detect", "fit_router", *(n for n in TITLES if n != "ties")]
    return Synthetic(Store(tmp_path_factory.mktemp("small")), leave_out=left_out)


def test_stage_writes_page_numbers_and_figures(small: Synthetic, tmp_path: Path) -> None:
    timing: list[dict[str, object]] = []
    stage = Report(ReportSpec(), timing=timing, about={"run_id": "demo-1", "name": "demo", "config": {"seed": 3}})
    (unit,) = stage.units(small.artefacts)
    timing.append({"stage": "embed", "units": 1, "began_s": 1.0, "wall_s": 2.0, "at": {"forward": [[1, 2]]}})
    report = stage.process(unit, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content["run_id"] == "demo-1"
    assert content["numbers"]["timing.embed.wall_s"]["value"] == 2.0  # filled after the units were made
    written = sorted(path.stem for path in (tmp_path / "figures").glob("*.png"))
    assert written == content["figures"] and "timing" in written
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert report.rows_in == report.rows_out + report.rejected == len(unit.inputs)


def test_key_changes_with_a_result_and_not_with_a_clock(small: Synthetic) -> None:
    key = _key(small, Report(ReportSpec(), timing=[{"stage": "x", "wall_s": 1}]))
    assert key == _key(small, Report(ReportSpec(), timing=[{"stage": "x", "wall_s": 2}], about={"name": "y"}))
    fewer = {stage: units for stage, units in small.artefacts.items() if stage != "score"}
    other = Report(ReportSpec())
    assert key != other.key(other.units(fewer)[0])


def _key(run: Synthetic, stage: Report) -> str:
    return stage.key(stage.units(run.artefacts)[0])
