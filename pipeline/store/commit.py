"""Commit: a unit appears whole or not at all."""

import os
import platform
import resource
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from pipeline.store.layout import TEMPORARY, Artefact, Store
from pipeline.store.manifest import Manifest, describe_files


def commit(
    store: Store,
    produce: Callable[[Path], Any],
    *,
    stage: str,
    unit: str,
    key: str,
    version: int,
    seed: int | None,
    spec: dict[str, Any],
    settings: dict[str, Any],
    inputs: list[list[str]],
) -> Artefact:
    """The unit that `produce(directory)` writes, committed under its key.

    Written in a hidden sibling, flushed, described by its manifest, flushed again, then renamed once. Whoever loses
    a race discards its copy and returns the winner's. When `produce` raises, nothing remains.
    """
    target = store.directory(stage, unit, key)
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        began = time.time()
        report = produce(temporary)
        produced = time.time()
        files = describe_files(temporary)
        for name in files:
            flush(temporary / name)
        for folder in temporary.rglob("*/"):
            flush(folder)
        manifest = Manifest(
            stage=stage,
            unit=unit,
            key=key,
            version=version,
            seed=seed,
            spec=spec,
            settings=settings,
            inputs=inputs,
            files=files,
            report=asdict(report) if is_dataclass(report) and not isinstance(report, type) else dict(report),
            made={
                "host": platform.node(),
                "pid": os.getpid(),
                "began": began,
                "process_s": produced - began,
                "commit_s": time.time() - produced,
                # Of the whole process since it began: an upper bound on what this unit needed.
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            },
        )
        manifest.write(temporary)
        flush(temporary)
        _rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(store.state_directory(stage, unit, key), ignore_errors=True)
    return Artefact.of(target, Manifest.read(target))


def _rename(temporary: Path, target: Path) -> None:
    """One rename into place; when the target already holds a unit, ours is discarded."""
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(temporary)
    flush(target.parent)


def flush(path: Path) -> None:
    """Everything written to this file or directory is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
