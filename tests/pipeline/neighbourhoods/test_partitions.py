"""Partitions hold every unit once, keep to their room, and stay where they are when units are put in elsewhere."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.neighbourhoods.partitions import Partition, pair_id, pairs, partitions
from pipeline.store import Artefact

ROOM = 1000


def unit(name: str, rows: int = 100) -> Artefact:
    return Artefact("embed", name, "", Path(), "", 0, {"rows_out": rows}, {})


def names(part: Partition) -> tuple[str, ...]:
    return tuple(each.unit for each in part.units)


def units(count: int, task: str = "a", rows: int = 100) -> list[Artefact]:
    return [unit(f"{task}-train-{number:05d}", rows) for number in range(count)]


@given(st.lists(st.integers(0, 1500), min_size=1, max_size=60))
def test_every_unit_with_rows_is_in_one_partition_in_order(sizes: list[int]) -> None:
    given_units = [unit(f"u-{number:05d}", rows) for number, rows in enumerate(sizes)]
    parts = partitions(list(reversed(given_units)), ROOM)
    assert [each for part in parts for each in part.units] == [each for each in given_units if each.report["rows_out"]]
    assert all(part.n_rows <= ROOM or len(part.units) == 1 for part in parts)
    starts = [part.first_row for part in parts]
    assert starts == [sum(part.n_rows for part in parts[:place]) for place in range(len(parts))]


def test_partitions_are_filled_well() -> None:
    parts = partitions(units(2000), ROOM)
    assert 400 < sum(part.n_rows for part in parts) / len(parts) < 900


@pytest.mark.parametrize("place", [0, 17, 333, 999, 1000])
def test_new_units_change_the_partitions_near_them_and_no_others(place: int) -> None:
    before = units(1000)
    name = f"a-train-{place - 1:05d}x" if place else "a-train-"
    kept = {names(part) for part in partitions(before, ROOM)}
    after = {names(part) for part in partitions([*before, unit(f"{name}1"), unit(f"{name}2")], ROOM)}
    assert len(after - kept) <= 6 and len(kept - after) <= 6
    assert len(kept) > 100


def test_a_task_that_sorts_before_the_others_leaves_theirs_alone() -> None:
    pool = [*units(300, "m"), *units(300, "z")]
    kept = {names(part) for part in partitions(pool, ROOM)}
    after = {names(part) for part in partitions([*units(40, "a"), *pool], ROOM)}
    assert len(kept - after) <= 6


def test_pairs_are_every_two_partitions_once_under_names_of_their_own() -> None:
    parts = partitions(units(60), ROOM)
    found = pairs(parts)
    assert len(found) == len(parts) * (len(parts) + 1) // 2
    assert len({pair_id(*pair) for pair in found}) == len(found)
    assert all(first.first_row <= second.first_row for first, second in found)


def test_rows_of_a_unit_are_those_within_its_partition() -> None:
    part = partitions([unit("a", 3), unit("b", 4)], ROOM)[0]
    assert part.id == "a" and part.rows_of("b") == range(3, 7)
