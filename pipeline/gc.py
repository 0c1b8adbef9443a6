"""Garbage collection: units that no run pins, orphaned temporaries, abandoned training state."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.record import read_record, run_ids
from pipeline.store import Store, hold
from pipeline.store.layout import TRAINING_STATE

RAY_TRAIN = ".ray_train"


@dataclass(frozen=True)
class Removed:
    """One thing that was, or would be, removed."""

    path: Path
    size_bytes: int
    why: str


def collect(store: Store, *, keep_runs: int | None = None, dry_run: bool = False) -> list[Removed]:
    """Remove what nothing needs and say what it was; the store is held meanwhile, so no run loses a unit it uses.

    `keep_runs` also forgets all runs but that many newest ones, and with them what only they pinned.
    """
    with hold(store.root, "bd-merge gc"):
        doomed = _doomed(store, keep_runs)
        if not dry_run:
            for each in doomed:
                # A unit is put aside first: a kill in the middle leaves what the next sweep takes, never half a unit.
                shutil.rmtree(store.set_aside(each.path) if store.is_unit(each.path) else each.path)
    return doomed


def _doomed(store: Store, keep_runs: int | None) -> list[Removed]:
    ids = run_ids(store)
    forgotten = ids[: max(0, len(ids) - keep_runs)] if keep_runs is not None else []
    removed = [_removed(store.run_directory(run_id), "a forgotten run") for run_id in forgotten]
    pinned = {
        store.directory(stage, unit, key)
        for run_id in ids
        if run_id not in forgotten
        for stage, units in read_record(store, run_id).stages.items()
        for unit, key in units.items()
    }
    removed += [_removed(path, "pinned by no run") for path, _ in store.units() if path not in pinned]
    removed += [_removed(path, "its manifest cannot be read") for path in store.unreadable()]
    removed += [_removed(path, "left by an interrupted run") for path in store.passing()]
    removed += _abandoned_fits(store, awaited={path for path in pinned if not path.exists()})
    removed += [
        _removed(path, "logs of a forgotten run")
        for path in sorted(store.root.glob("logs/*"))
        if path.name in forgotten
    ]
    return removed


def _abandoned_fits(store: Store, awaited: set[Path]) -> list[Removed]:
    """State of fits that no run will go on with; `awaited` are the units that a run pins and nobody has made yet."""
    states = {path.with_name(TRAINING_STATE + path.name) for path in awaited}
    jobs = {store.root / RAY_TRAIN / f"{path.parent.name}-{path.name}" for path in awaited}
    why = "state of a fit that no run waits for"
    kept = [*sorted(store.root.glob(f"*/{TRAINING_STATE}*")), *sorted(store.root.glob(f"{RAY_TRAIN}/*"))]
    return [_removed(path, why) for path in kept if path not in states | jobs]


def _removed(path: Path, why: str) -> Removed:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Removed(path, size, why)
