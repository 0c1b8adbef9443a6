"""Two runs side by side, from the store alone."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from synthetic_run import Synthetic

from pipeline.compare import Comparison, compare_runs, comparison_table, differing_settings, flatten, run_rows
from pipeline.errors import ConfigError, DataError
from pipeline.record import RunRecord
from pipeline.store import Store


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Synthetic]:
    store = Store(tmp_path_factory.mktemp("two"))
    return [Synthetic(store), Synthetic(store, seed=1, name="[other]", leave_out=["bd_task"])]


@pytest.fixture(scope="module")
def comparison(runs: list[Synthetic]) -> Comparison:
    return compare_runs([(RunRecord(**run.record), run.artefacts) for run in runs])


def test_rows_hold_the_measured_means(runs: list[Synthetic], comparison: Comparison) -> None:
    own = [{(r.protocol, r.title): r for r in run_rows(run.artefacts)} for run in runs]
    assert len(comparison.rows) == 9 + 8  # the individual experts are not one model
    for row in comparison.rows:
        for level, values in row.accuracy.items():
            for index, rows in enumerate(own):
                held = rows.get((row.protocol, row.title))
                assert values[index] == (held.accuracy[level] if held else None)


def test_a_method_that_one_run_lacks_has_no_difference(comparison: Comparison) -> None:
    (row,) = (r for r in comparison.rows if r.title == "BD-Merging (task-wise)" and r.protocol == "task_known")
    assert row.accuracy["L3"][1] is None and row.difference("L3", 1) is None
    (other,) = (r for r in comparison.rows if r.title == "Ties-Merging" and r.protocol == "task_known")
    first, second = other.accuracy["L3"]
    assert first is not None and second is not None
    assert other.difference("L3", 1) == pytest.approx(second - first)


def test_rows_stand_references_first_and_ours_last_however_pinned(runs: list[Synthetic]) -> None:
    shuffled = {"evaluate": sorted(runs[0].artefacts["evaluate"], key=lambda unit: unit.unit)}
    models = [row.model for row in run_rows(shuffled) if row.protocol == "task_known"]
    assert models[:2] == ["pretrained", "experts"] and models[-2:] == ["bd_task", "bd_layer"]


def test_only_differing_settings_are_named(comparison: Comparison) -> None:
    assert comparison.settings == {"seed": ("0", "1")}
    left: dict[str, Any] = {"a": {"b": [1, 2]}, "store": "/x", "only": True}
    right: dict[str, Any] = {"a": {"b": [1, 3]}, "store": "/y"}
    assert differing_settings([left, right]) == {"a.b": ("[1, 2]", "[1, 3]"), "only": ("true", "–")}


def test_flatten_numbers_the_entries_of_nested_lists() -> None:
    assert flatten({"tasks": [{"name": "a"}, {"name": "b"}], "e": {}, "n": None}) == {
        "tasks.0.name": "a", "tasks.1.name": "b", "e": "{}", "n": "null"
    }  # fmt: skip


def test_table_prints_names_as_they_are(comparison: Comparison) -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(comparison_table(comparison))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[other]-0000000001" in text and "settings that differ" in text and "Ties-Merging" in text


def test_one_run_or_a_run_without_results_is_the_users_mistake(runs: list[Synthetic]) -> None:
    record = RunRecord(**runs[0].record)
    with pytest.raises(ConfigError, match="at least 2"):
        compare_runs([(record, runs[0].artefacts)])
    with pytest.raises(ConfigError, match="evaluated no model"):
        compare_runs([(record, runs[0].artefacts), (record, {})])


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    run = Synthetic(Store(tmp_path), leave_out=["pairs", "detect"])
    run.artefacts["evaluate"][0].file("metrics.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics\.json"):
        run_rows(run.artefacts)
