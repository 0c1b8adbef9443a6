"""Reading what the stages committed: the only file access of the report, and the reference each number carries."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.store import Artefact

Columns = dict[str, np.ndarray[Any, Any]]


def reference(artefact: Artefact) -> str:
    """`<stage>/<unit>-<key12>`: the unit's directory in the store, which holds its key."""
    return f"{artefact.stage}/{artefact.unit}-{artefact.key[:12]}"


def title_of(artefact: Artefact) -> str:
    """A reader's name for a unit: `fit router: layer`; the unit alone adds nothing where it repeats its stage."""
    stage = artefact.stage.replace("_", " ")
    return stage if artefact.unit in stage.split() else f"{stage}: {artefact.unit}"


@dataclass(frozen=True)
class Parts:
    """The committed units a report may read, by stage; a stage or unit that is not there is simply absent."""

    by_stage: Mapping[str, Sequence[Artefact]]

    def units(self, stage: str) -> list[Artefact]:
        """Units of one stage, sorted by unit id (the order that defines global rows)."""
        return sorted(self.by_stage.get(stage, ()), key=lambda artefact: artefact.unit)

    def holding(self, stage: str, file: str) -> Artefact | None:
        """The first unit of a stage that holds `file`, or None where this run has none."""
        return next((artefact for artefact in self.units(stage) if artefact.file(file).is_file()), None)

    def everything(self) -> list[Artefact]:
        """All units of all stages, in the order of the stages given."""
        return [artefact for stage in self.by_stage for artefact in self.units(stage)]

    def group(self, stage: str) -> str:
        """The reference of a number made from all units of a stage; `report.json` lists its members."""
        units = self.units(stage)
        return reference(units[0]) if len(units) == 1 else f"{stage}/*"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `DataError` with the file when it is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); remove the unit's directory and run again") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Parquet table with the given columns; `DataError` with the file and the missing columns."""
    try:
        present = pq.read_schema(path).names
        if columns is not None and (missing := [name for name in columns if name not in present]):
            raise DataError(f"{path}: no column {', '.join(missing)}; it has {', '.join(present)}")
        return pq.read_table(path, columns=list(columns) if columns is not None else None)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: not readable as Parquet ({error}); remove the unit's directory, run again") from error


def numbers_of(table: pa.Table, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Column as float64; a null becomes nan."""
    return np.asarray(table.column(name).to_numpy(zero_copy_only=False), dtype=np.float64)
