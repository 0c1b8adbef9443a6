"""Accuracy beside cost: places, what is counted as a method's cost, and labels that are told."""

import json
import re
from pathlib import Path

import pytest
from synthetic_run import NEEDS, TITLES, Synthetic

from pipeline.costs import read_costs
from pipeline.reporting import Report, ranking
from pipeline.reporting.parts import Parts
from pipeline.reporting.results import ModelResult, Results, read_results


def row_of(report: Report, title: str) -> str:
    table = report.html[report.html.index('class="results ranking"') :]
    return next(row for row in re.findall(r"<tr>(.*?)</tr>", table) if title in row)


def test_methods_stand_by_their_accuracy_under_corruption_and_bounds_have_no_place(
    report: Report, run: Synthetic
) -> None:
    results = read_results(Parts(run.artefacts))
    means = [ranking.accuracy(model) for model in ranking.rank(results)]
    assert means == sorted(means, reverse=True) and len(means) == len(NEEDS)  # type: ignore[type-var]
    numbers = json.loads(report.json)["numbers"]
    best = max(results.contenders, key=lambda model: model.corrupted("task_known") or 0)
    assert numbers[f"rank.{best.name}"]["value"] == 1
    assert not {"rank.pretrained", "rank.experts"} & set(numbers)


def test_equal_accuracy_is_an_equal_place() -> None:
    cells = {"clean": {"mean": {"accuracy": 0.5}}}
    models = [
        ModelResult(name, name, (), ("clean",), {"task_known": cells}, {}, None, {}, name) for name in ("a", "b", "c")
    ]
    assert [place for place, _ in ranking.placed(ranking.rank(Results(tuple(models))))] == [1, 1, 1]


def test_a_cost_is_that_of_all_units_since_what_every_method_is_given(run: Synthetic) -> None:
    costs = read_costs(run.artefacts)
    made = {f"{a.stage}/{a.unit}": a for units in run.artefacts.values() for a in units}
    assert set(costs) == set(NEEDS)
    for name in ("bd_task", "bd_layer"):
        exported, fitted = made[f"export/{name}"], made[f"fit_router/{name.removeprefix('bd_')}"]
        # What was watched counts as watched, the rest as whole units.
        assert costs[name].seconds == pytest.approx(exported.report["seconds"]["merge"] + fitted.made["process_s"])
        assert costs[name].price == 2.5
    assert costs["ties"].seconds == 0.25
    assert costs["ties"].price == 1.0, "one set of weights costs what the plain model costs"
    assert costs["ties"].memory_bytes == 12e6


def test_every_row_says_what_its_method_needs_and_which_read_labels(report: Report) -> None:
    for name, need in NEEDS.items():
        row = row_of(report, TITLES[name])
        assert ranking.NEEDS[need][0] in row
        assert ("†" in row) == (need in ranking.READ_LABELS)


def test_costs_that_nobody_measured_are_a_dash(run: Synthetic, tmp_path: Path) -> None:
    without = {stage: units for stage, units in run.artefacts.items() if stage not in ("baselines", "export")}
    assert read_costs(without) == {}
