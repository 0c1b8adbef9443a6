"""The record of a run: which unit of which key it used, under which configuration, and where the time went."""

import json
import os
import subprocess
import time
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, DataError
from pipeline.store import Artefact, Store
from pipeline.store.keys import digest_json

SCHEMA = 1
RECORD_NAME = "run.json"
VERSIONED = (
    "bd-merging",
    "torch",
    "open_clip_torch",
    "ray",
    "faiss-cpu",
    "faiss-gpu-cu12",
    "mlflow",
    "numpy",
    "pyarrow",
)


@dataclass
class RunRecord:
    """A run, written when a stage begins. Its id follows from name and configuration, so the same command resumes it.

    `stages` pins {stage: {unit: key}} of what the run uses or is about to make: `gc` keeps these.
    """

    run_id: str
    name: str
    config: dict[str, Any]
    created: str
    finished: str | None = None
    tracked: str | None = None
    git: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    stages: dict[str, dict[str, str]] = field(default_factory=dict)
    timing: list[dict[str, Any]] = field(default_factory=list)
    schema: int = SCHEMA

    @classmethod
    def begin(cls, name: str, config: dict[str, Any], hashed: dict[str, Any]) -> "RunRecord":
        """A fresh record for `config`; `hashed` is the part of it that tells runs apart."""
        return cls(
            run_id=f"{name}-{digest_json(hashed)[:10]}",
            name=name,
            config=config,
            created=now(),
            git=_git_revision(),
            versions=_versions(),
        )

    def write(self, store: Store) -> None:
        """Write the record, replacing the last one in one step."""
        directory = store.run_directory(self.run_id)
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f".{RECORD_NAME}"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(directory / RECORD_NAME)

    def artefacts(self, store: Store) -> dict[str, list[Artefact]]:
        """Every pinned unit; `DataError` when one is gone or damaged."""
        found: dict[str, list[Artefact]] = {}
        for stage, units in self.stages.items():
            for unit, key in units.items():
                artefact = store.find(stage, unit, key)
                if artefact is None:
                    raise DataError(
                        f"run {self.run_id}: {store.directory(stage, unit, key)} is gone or damaged; run it again"
                    )
                found.setdefault(stage, []).append(artefact)
        return found


def read_record(store: Store, run_id: str) -> RunRecord:
    """The record of `run_id` (or of the only run whose id begins with it)."""
    known = run_ids(store)
    matching = [run_id] if run_id in known else [name for name in known if name.startswith(run_id)]
    if len(matching) != 1:
        which = "no" if not matching else f"{len(matching)} runs'"
        raise ConfigError(f"{which} record matches {run_id!r} in {store.root}; known: {', '.join(known) or 'none'}")
    path = store.run_directory(matching[0]) / RECORD_NAME
    try:
        return RunRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a readable run record ({error}); remove it and run again") from error


def run_ids(store: Store) -> list[str]:
    """Ids of all runs of the store, oldest record first."""
    paths = sorted(store.root.glob(f"runs/*/{RECORD_NAME}"), key=lambda path: path.stat().st_mtime)
    return [path.parent.name for path in paths]


def now() -> str:
    """The time of day, to the second, with its zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _versions() -> dict[str, str]:
    installed = {}
    for package in VERSIONED:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _git_revision() -> str:
    """The commit this code comes from, `+changes` when the tree differs; empty outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+changes", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
