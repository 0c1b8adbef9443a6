"""Where the time went: the sweep over intervals against a count of milliseconds, and what a row of the record holds."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.timing import BETWEEN, COMMIT, INSIDE, OUTSIDE, PASSES, TOTAL, UNIT, read_timing, spent, union

Row = dict[str, Any]
moments = st.integers(0, 40)
intervals = st.lists(st.tuples(moments, moments).map(sorted).map(list), max_size=4)
kinds = st.sampled_from([UNIT, COMMIT, "forward_backward", "forward", "decode", "draw"])
stages = st.builds(
    lambda number, began, wall, at: {"stage": f"s{number}", "units": 1, "began_s": began, "wall_s": wall, "at": at},
    st.integers(0, 9), moments, moments, st.dictionaries(kinds, intervals, max_size=4),
)  # fmt: skip
bare = st.builds(
    lambda began, wall: {"stage": "executor start", "began_s": began, "wall_s": wall}, moments, moments
)  # fmt: skip


def counted(rows: list[Row], total: int) -> dict[str, float]:
    """The definition, second by second: a pass first, then named work (shared), commits, units, bare rows, stages."""
    found: dict[str, float] = {}

    def at(second: int, given: list[list[int]]) -> bool:
        return any(began <= second < ended for began, ended in given)

    for second in range(total):
        work = {name for row in rows for name, given in row.get("at", {}).items() if at(second, given)}
        under_way = [r for r in rows if r["began_s"] <= second < r["began_s"] + r["wall_s"]]
        named = sorted(work - PASSES - {UNIT, COMMIT})
        bare_rows = sorted({row["stage"] for row in under_way if not row.get("units")})
        if work & PASSES:
            labels = ["passes"]
        elif named:
            labels = named
        elif COMMIT in work:
            labels = [COMMIT]
        elif UNIT in work:
            labels = [INSIDE]
        elif bare_rows:
            labels = bare_rows
        else:
            labels = [BETWEEN] if under_way else [OUTSIDE]
        for label in labels:
            found[label] = found.get(label, 0.0) + 1 / len(labels)
    return found


@given(st.lists(stages | bare, min_size=1, max_size=6))
def test_every_second_of_a_run_is_counted_once_and_as_what_it_was(rows: list[Row]) -> None:
    total = max(row["began_s"] + row["wall_s"] for row in rows)
    where = spent(read_timing(rows))
    expected = counted(rows, total)
    assert where.total_s == total
    assert where.passes_s == pytest.approx(expected.pop("passes", 0.0))
    assert dict(where.others) == pytest.approx(expected)
    if total:
        assert where.overhead_share == pytest.approx(1 - where.passes_s / total)


def test_passes_of_units_that_ran_at_once_count_once() -> None:
    at = {UNIT: [[0, 10]], "forward_backward": [[0, 9], [1, 10]]}
    (time,) = read_timing([{"stage": "s", "units": 2, "began_s": 0, "wall_s": 12, "at": at}])
    assert time.passes == [(0, 10)]
    where = spent([time])
    assert where.passes_s == 10 and where.others == ((BETWEEN, 2.0),)


def test_the_row_of_the_whole_run_ends_the_count() -> None:
    rows = [{"stage": "s", "units": 1, "began_s": 1, "wall_s": 2}, {"stage": TOTAL, "wall_s": 5}]
    where = spent(read_timing(rows))
    assert where.total_s == 5 and dict(where.others) == {BETWEEN: 2.0, OUTSIDE: 3.0}


def test_a_run_without_rows_took_no_time() -> None:
    assert spent([]).overhead_share == 0.0


@given(st.lists(st.tuples(moments, moments).map(lambda pair: (float(min(pair)), float(max(pair)))), max_size=8))
def test_a_union_is_disjoint_sorted_and_the_same_time(given: list[tuple[float, float]]) -> None:
    merged = union(given)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(merged))
    for moment in range(41):
        inside = any(began <= moment + 0.5 < ended for began, ended in given)
        assert inside == any(began <= moment + 0.5 < ended for began, ended in merged)
