"""Keys: the sha256 of everything that can change a unit's bytes."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

KEY_CHARS_IN_NAMES = 12


def canonical_json(value: Any) -> bytes:
    """`value` as JSON bytes that are equal for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_json(value: Any) -> str:
    """The sha256 (hex) of `value`'s canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_file(path: Path) -> str:
    """The sha256 (hex) of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest for a unit's files: their paths and sha256, nothing of when or where they were made."""
    return digest_json(sorted((path, entry["sha256"]) for path, entry in files.items()))


def unit_key(
    *,
    stage: str,
    version: int,
    spec: Mapping[str, Any],
    settings: Mapping[str, Any],
    inputs: Iterable[tuple[str, str]],
    seed: int | None,
) -> str:
    """The key of one unit: (stage, version, spec, settings, [(input unit, digest of its files)], seed).

    Input order is kept: it is part of what the unit reads. An input counts by its files' digest and not by its own
    key, so equal bytes upstream stop a recomputation here.
    """
    return digest_json(
        {
            "stage": stage,
            "version": version,
            "spec": spec,
            "settings": settings,
            "inputs": [list(pair) for pair in inputs],
            "seed": seed,
        }
    )
