"""Where a run's time went: forward and backward passes, and what else was done while none ran.

Stages overlap, and units of one stage do too. An instant counts as a pass while any unit is in one; every other
instant is counted under what was under way then, so that all kinds together make up the run.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.store import Artefact

TOTAL = "total"
PASSES = frozenset({"forward", "backward", "forward_backward", "optimiser", "train", "compute"})

UNIT, COMMIT = "unit", "commit (hash, flush, rename)"
INSIDE = "inside units, not itemised"
BETWEEN = "between units (schedule, start workers, wait)"
OUTSIDE = "outside stages (checks, keys, record)"

Interval = tuple[float, float]


def stage_times(made: Sequence[Artefact], started: float, n_units: int) -> dict[str, Any]:
    """What the record keeps of one stage: `made` are the units that ran, `started` is the run's first second.

    `at` has, for every kind of work, when any unit was at it: [began, ended] in seconds of the run.
    """
    at: dict[str, list[Interval]] = {UNIT: [], COMMIT: []}
    spans: dict[str, float] = {}
    for artefact in made:
        began, process_s = artefact.made["began"] - started, artefact.made["process_s"]
        ended = began + process_s
        at[UNIT].append((began, ended))
        at[COMMIT].append((ended, ended + artefact.made["commit_s"]))
        for name, first, last in artefact.report["spans"]:
            at.setdefault(name, []).append((first - started, last - started))
        for name, seconds in artefact.report["seconds"].items():
            spans[name] = spans.get(name, 0.0) + seconds
    return {
        "units": n_units,
        "reused": n_units - len(made),
        "busy_s": sum(artefact.made["process_s"] for artefact in made),
        "bytes": sum(artefact.size_bytes for artefact in made),
        "spans": spans,
        "at": {name: [[round(a, 3), round(b, 3)] for a, b in union(found)] for name, found in at.items()},
    }


@dataclass(frozen=True)
class StageTime:
    """One row of a run's record. Seconds of the run; `busy_s` and `spans` are summed over units."""

    stage: str
    began_s: float
    wall_s: float
    units: int = 0
    reused: int = 0
    busy_s: float = 0.0
    size_bytes: int = 0
    spans: Mapping[str, float] = field(default_factory=dict)
    at: Mapping[str, Sequence[Interval]] = field(default_factory=dict)

    @property
    def interval(self) -> Interval:
        """When the stage began and ended."""
        return self.began_s, self.began_s + self.wall_s

    @property
    def passes(self) -> list[Interval]:
        """When any of its units was in a forward or backward pass."""
        return union(interval for name in self.at.keys() & PASSES for interval in self.at[name])


def read_timing(rows: Iterable[Mapping[str, Any]]) -> list[StageTime]:
    """The rows of a run's record."""
    return [
        StageTime(
            stage=str(row["stage"]),
            began_s=float(row.get("began_s") or 0),
            wall_s=float(row.get("wall_s") or 0),
            units=int(row.get("units") or 0),
            reused=int(row.get("reused") or 0),
            busy_s=float(row.get("busy_s") or 0),
            size_bytes=int(row.get("bytes") or 0),
            spans=dict(row.get("spans") or {}),
            at={name: [(float(a), float(b)) for a, b in found] for name, found in (row.get("at") or {}).items()},
        )
        for row in rows
    ]


@dataclass(frozen=True)
class Spent:
    """A run's seconds: `passes_s` in forward and backward passes, and the rest by kind, largest first."""

    total_s: float
    passes_s: float
    others: tuple[tuple[str, float], ...]

    @property
    def overhead_share(self) -> float:
        """The share of the run during which no pass ran."""
        return 1 - self.passes_s / self.total_s if self.total_s > 0 else 0.0


def spent(times: Sequence[StageTime]) -> Spent:
    """Where the time went; until the last row ended, or for the whole run once its own row is there."""
    total_s = max((time.interval[1] for time in times), default=0.0)
    times = [time for time in times if time.stage != TOTAL]
    kinds = _by_kind(times)
    edges = np.unique([0.0, total_s, *(edge for found in kinds.values() for each in found for edge in each)])
    edges = edges[(edges >= 0) & (edges <= total_s)]
    middles, lengths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    left = np.ones(len(lengths), dtype=bool)
    seconds: dict[str, float] = {}
    stages = {time.stage for time in times if not time.units}
    for among in _in_order(kinds, stages):
        covered = {kind: _within(middles, kinds[kind]) & left for kind in among}
        shared_by = sum(covered.values(), np.zeros(len(lengths)))
        for kind, inside in covered.items():
            seconds[kind] = float((lengths[inside] / shared_by[inside]).sum())
        left &= shared_by == 0
    seconds[OUTSIDE] = float(lengths[left].sum())
    passes_s = seconds.pop(_PASSES)
    others = sorted(((n, s) for n, s in seconds.items() if s > 0.0005), key=lambda item: (-item[1], item[0]))
    return Spent(total_s, passes_s, tuple(others))


_PASSES, _STAGE = "passes", "stage"


def _by_kind(times: Sequence[StageTime]) -> dict[str, list[Interval]]:
    """When each kind of work was done; a row without units, such as the executor's start, is a kind of its own."""
    kinds: dict[str, list[Interval]] = {_PASSES: [], UNIT: [], COMMIT: [], _STAGE: []}
    for time in times:
        kinds.setdefault(_STAGE if time.units else time.stage, []).append(time.interval)
        kinds[_PASSES] += time.passes
        for name, found in time.at.items():
            if name not in PASSES:
                kinds.setdefault(name, []).extend(found)
    kinds[INSIDE], kinds[BETWEEN] = kinds.pop(UNIT), kinds.pop(_STAGE)
    return {kind: union(found) for kind, found in kinds.items()}


def _in_order(kinds: Iterable[str], without_units: set[str]) -> list[list[str]]:
    """Kinds by what an instant is counted as first; those of one list share it."""
    last = [_PASSES, COMMIT, INSIDE, BETWEEN]
    named = [kind for kind in kinds if kind not in last and kind not in without_units]
    return [[_PASSES], named, [COMMIT], [INSIDE], sorted(without_units), [BETWEEN]]


def _within(points: np.ndarray[Any, Any], intervals: Sequence[Interval]) -> np.ndarray[Any, Any]:
    """Which points lie in one of these disjoint sorted intervals."""
    if not intervals:
        return np.zeros(len(points), dtype=bool)
    begins, ends = np.array(intervals).T
    place = np.searchsorted(begins, points, side="right") - 1
    inside: np.ndarray[Any, Any] = (place >= 0) & (points < ends[place])
    return inside


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as disjoint intervals, in order."""
    merged: list[Interval] = []
    for began, ended in sorted(intervals):
        if merged and began <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], ended))
        else:
            merged.append((began, ended))
    return merged


def seconds_of(intervals: Iterable[Interval]) -> float:
    """Their lengths together, for disjoint ones."""
    return sum(ended - began for began, ended in intervals)
