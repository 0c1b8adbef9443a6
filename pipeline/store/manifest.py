"""The manifest: a unit's completion record, which says what it completed."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.store.keys import files_digest, sha256_file

MANIFEST_NAME = "manifest.json"
SCHEMA = 1


@dataclass(frozen=True)
class Manifest:
    """What a committed unit is: its key and what made it, its files, what it reports.

    `report` and `made` (host, times, versions) are not part of the digest: equal files are equal units.
    """

    stage: str
    unit: str
    key: str
    version: int
    seed: int | None
    spec: dict[str, Any]
    settings: dict[str, Any]
    inputs: list[list[str]]
    files: dict[str, dict[str, Any]]
    report: dict[str, Any]
    made: dict[str, Any]
    schema: int = field(default=SCHEMA)

    @property
    def digest(self) -> str:
        """The digest by which later stages know this unit's bytes."""
        return files_digest(self.files)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together, the manifest left out."""
        return sum(int(entry["bytes"]) for entry in self.files.values())

    def write(self, directory: Path) -> None:
        """Write the manifest into `directory` and flush it to disk."""
        path = directory / MANIFEST_NAME
        with path.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """The manifest of `directory`; `DataError` when it is missing, torn or of another schema."""
        path = directory / MANIFEST_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise DataError(f"{path}: schema {data['schema']}, this version reads {SCHEMA}; use a new store")
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a readable manifest ({error}); remove {directory} and run again") from error

    def damage(self, directory: Path, *, contents: bool = False) -> str | None:
        """What is wrong with the unit's files on disk, or None: sizes always, sha256 when `contents`."""
        for name, entry in self.files.items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}"
            if contents and sha256_file(path) != entry["sha256"]:
                return f"{name} has another sha256 than the manifest says"
        return None


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """{relative path: {bytes, sha256}} of every file below `directory`, sorted."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in paths
    }
