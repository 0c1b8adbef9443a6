"""Where things lie: `<store>/<stage>/<unit>-<key12>/`, runs, logs, and what is only passing through."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, DataError
from pipeline.store.keys import KEY_CHARS_IN_NAMES
from pipeline.store.manifest import MANIFEST_NAME, Manifest

TEMPORARY = ".tmp-"
TRAINING_STATE = ".state-"
DAMAGED = ".damaged-"
NOT_STAGES = {"runs", "logs", "mlflow"}


@dataclass(frozen=True)
class Artefact:
    """One committed unit, as later stages see it. Travels between processes: paths and names, never contents."""

    stage: str
    unit: str
    key: str
    path: Path
    digest: str
    size_bytes: int
    report: dict[str, Any]
    made: dict[str, Any]

    @classmethod
    def of(cls, directory: Path, manifest: Manifest) -> "Artefact":
        """The artefact that `manifest` describes, lying in `directory`."""
        return cls(
            stage=manifest.stage,
            unit=manifest.unit,
            key=manifest.key,
            path=directory,
            digest=manifest.digest,
            size_bytes=manifest.size_bytes,
            report=manifest.report,
            made=manifest.made,
        )

    def file(self, name: str) -> Path:
        """The path of one of the unit's files."""
        return self.path / name


class Store:
    """A store on a file system that every worker sees."""

    def __init__(self, root: Path) -> None:
        if "://" in str(root):
            raise ConfigError(f"store {root}: only paths of a shared file system are supported; mount the bucket")
        self.root = root.expanduser().absolute()

    def check_usable(self) -> None:
        """`ConfigError` unless units can be written here; nothing is created."""
        existing = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not existing.is_dir():
            raise ConfigError(f"store {self.root}: {existing} is a file; name a directory with store=... or BD_STORE")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError(f"store {self.root}: {existing} is not writable; name another directory with store=...")

    def directory(self, stage: str, unit: str, key: str) -> Path:
        """Where the unit lies, or will lie."""
        return self.root / stage / f"{unit}-{key[:KEY_CHARS_IN_NAMES]}"

    def find(self, stage: str, unit: str, key: str) -> Artefact | None:
        """The committed unit with this key, or None when there is none or its files are not as the manifest says."""
        directory = self.directory(stage, unit, key)
        if not directory.is_dir():
            return None
        try:
            manifest = Manifest.read(directory)
        except DataError:
            return None
        if manifest.key != key or manifest.damage(directory):
            return None
        return Artefact.of(directory, manifest)

    def is_unit(self, path: Path) -> bool:
        """Whether `path` is where a committed unit lies."""
        return path.parent in self._stages() and not path.name.startswith(".")

    def set_aside(self, directory: Path) -> Path:
        """Rename a unit that is damaged or no longer wanted out of the way; the new path."""
        target = directory.with_name(f"{DAMAGED}{directory.name}")
        shutil.rmtree(target, ignore_errors=True)
        return directory.rename(target)

    def state_directory(self, stage: str, unit: str, key: str) -> Path:
        """Where an unfinished training keeps what it needs to resume; removed when the unit is committed."""
        return self.root / stage / f"{TRAINING_STATE}{unit}-{key[:KEY_CHARS_IN_NAMES]}"

    @staticmethod
    def state_beside(temporary: Path) -> Path:
        """The state directory of the unit that is being written in `temporary`."""
        return temporary.with_name(TRAINING_STATE + temporary.name.removeprefix(TEMPORARY).rpartition("-")[0])

    def run_directory(self, run_id: str) -> Path:
        """Where the record of a run lies."""
        return self.root / "runs" / run_id

    def log_path(self, run_id: str, stage: str, unit: str) -> Path:
        """Where the traceback of a failed unit is written."""
        return self.root / "logs" / run_id / f"{stage}-{unit}.log"

    def units(self) -> Iterator[tuple[Path, Manifest]]:
        """Every committed unit, in order of its path; unreadable ones are left out."""
        for directory in self._visible():
            try:
                yield directory, Manifest.read(directory)
            except DataError:
                continue

    def unreadable(self) -> list[Path]:
        """Directories that hold a manifest which nobody can read: a unit once, before the disk damaged it."""
        readable = {directory for directory, _ in self.units()}
        return [p for p in self._visible() if p not in readable and (p / MANIFEST_NAME).exists()]

    def passing(self) -> list[Path]:
        """Temporaries and damaged units: what the holder of the store may sweep away."""
        if not self.root.is_dir():
            return []
        prefixes = (TEMPORARY, DAMAGED)
        return sorted(p for stage in self._stages() for p in stage.iterdir() if p.name.startswith(prefixes))

    def sweep(self) -> int:
        """Remove orphaned temporaries; how many. Only for the process that holds the store."""
        orphans = self.passing()
        for path in orphans:
            shutil.rmtree(path, ignore_errors=True)
        return len(orphans)

    def _stages(self) -> list[Path]:
        children = sorted(self.root.iterdir()) if self.root.is_dir() else []
        return [p for p in children if p.is_dir() and p.name not in NOT_STAGES and not p.name.startswith(".")]

    def _visible(self) -> list[Path]:
        return [p for stage in self._stages() for p in sorted(stage.iterdir()) if not p.name.startswith(".")]
