"""Commits small units of our own into a real store."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.store import Artefact, Store, commit, unit_key

FILES = {"table.bin": b"0123456789" * 1000, "figures/picture.bin": b"picture" * 500}


def write_files(directory: Path) -> dict[str, Any]:
    """What a small unit writes, and its report."""
    for name, content in FILES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    return {"rows_in": 1, "rows_out": 1, "rejected": 0, "seconds": {}}


def key_of(unit: str, **changes: Any) -> str:
    parts = {"stage": "made", "version": 1, "spec": {}, "settings": {"unit": unit}, "inputs": [], "seed": None}
    return unit_key(**{**parts, **changes})


def commit_unit(
    store: Store, unit: str = "unit", produce: Callable[[Path], Any] = write_files, stage: str = "made"
) -> Artefact:
    key = key_of(unit, stage=stage)
    return commit(
        store,
        produce,
        stage=stage,
        unit=unit,
        key=key,
        version=1,
        seed=None,
        spec={},
        settings={"unit": unit},
        inputs=[],
    )


def commit_for_ever(root: Path) -> None:
    """Commit one unit after the other until somebody ends this process."""
    for number in itertools.count(len(list(Store(root).units()))):
        commit_unit(Store(root), f"u{number:05d}")


def hold_until_killed(root: Path) -> None:
    """Hold the store and touch `held` beside it."""
    import signal

    from pipeline.store import hold

    with hold(root, "bd-merge run configs/mine.yaml"):
        root.with_name("held").touch()
        signal.pause()
