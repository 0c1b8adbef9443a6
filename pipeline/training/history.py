"""Loss curves as a table: `step` and one column a term."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from pipeline.formats.tables import field, write_table


def write_history(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write `history`, a row a step; a term that some steps lack is null there."""
    terms = sorted({name for row in history for name in row} - {"step"})
    schema = pa.schema([field("step", pa.int64()), *(field(name, pa.float64(), nullable=True) for name in terms)])
    columns = {name: [row.get(name) for row in history] for name in terms}
    write_table(path, schema, {"step": [int(row["step"]) for row in history], **columns})
