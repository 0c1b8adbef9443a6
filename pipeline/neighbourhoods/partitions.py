"""Partitions: runs of consecutive embed units that are joined as one, cut so that new shards move few cuts.

Where a partition ends depends on the units' own names and sizes and on nothing far away: a unit closes its partition
when a number drawn from its name says so, or when the next one would not fit. Wherever a unit is put in, the cuts soon
fall where they fell before, so partitions away from it stay what they were, and so do the joins of these.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.store import Artefact

LEAST_FILLED = 4  # a partition is not closed by a draw before it holds this part of its room


@dataclass(frozen=True)
class Partition:
    """Consecutive embed units. Its name is its first unit's: it does not change when others are put before it."""

    units: tuple[Artefact, ...]
    first_row: int  # in the pool

    @property
    def id(self) -> str:
        """The name of its first unit."""
        return self.units[0].unit

    @cached_property
    def n_rows(self) -> int:
        """Rows of all its units."""
        return sum(_rows(unit) for unit in self.units)

    def rows_of(self, unit: str) -> range:
        """The rows within the partition of the embed unit with this id."""
        start = 0
        for each in self.units:
            if each.unit == unit:
                return range(start, start + _rows(each))
            start += _rows(each)
        raise AssertionError(f"{unit} is not in partition {self.id}")


def partitions(embedded: Sequence[Artefact], room: int) -> list[Partition]:
    """The partitions of all embed units that have rows, of at most `room` rows (or of one unit that has more)."""
    found: list[Partition] = []
    open_units: list[Artefact] = []
    first_row = row = 0

    def close() -> None:
        nonlocal first_row
        if open_units:
            found.append(Partition(tuple(open_units), first_row))
            open_units.clear()
        first_row = row

    for unit in sorted(embedded, key=lambda artefact: artefact.unit):
        n_rows = _rows(unit)
        if not n_rows:
            continue
        if row - first_row + n_rows > room:
            close()
        open_units.append(unit)
        row += n_rows
        # Drawn in proportion to the unit's rows, so that partitions are as large whatever the size of the shards.
        if row - first_row >= room / LEAST_FILLED and _draw(unit.unit) < 2 * n_rows / room:
            close()
    close()
    return found


def pairs(parts: Sequence[Partition]) -> list[tuple[Partition, Partition]]:
    """Every pair of partitions once, each with itself included; the earlier one stands first."""
    return [(first, second) for place, first in enumerate(parts) for second in parts[place:]]


def pair_id(first: Partition, second: Partition) -> str:
    """The name of the join of two partitions."""
    return first.id if first.id == second.id else f"{first.id}--{second.id}"


def _rows(unit: Artefact) -> int:
    return int(unit.report["rows_out"])


def _draw(name: str) -> float:
    """A number in [0, 1) that is the name's own."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48
