"""Parquet tables with fixed options: equal columns give equal bytes, and the schema is checked on both sides."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError

ROWS_A_GROUP = 65_536


def write_table(path: Path, schema: pa.Schema, columns: Mapping[str, Any]) -> None:
    """Write `columns` (sequences, NumPy arrays or pyarrow arrays of one length) as a table of `schema`.

    A field that is not nullable in the schema must not hold a null.
    """
    assert list(columns) == schema.names, f"columns {list(columns)} are not the schema's {schema.names}"
    arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
    for field, array in zip(schema, arrays, strict=True):
        assert field.nullable or array.null_count == 0, f"column {field.name!r} has {array.null_count} nulls"
    table = pa.Table.from_arrays(arrays, schema=schema)  # raises where lengths differ
    pq.write_table(
        table,
        path,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=True,
        write_statistics=True,
        row_group_size=ROWS_A_GROUP,
    )


def read_table(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """The table in `path`, or some of its columns; DataError unless it has exactly the `schema`'s names and types."""
    try:
        file = pq.ParquetFile(path)
        found = {field.name: field.type for field in file.schema_arrow}
        wanted = {field.name: field.type for field in schema}
        if found != wanted:
            raise DataError(
                f"table {path}: columns {_described(found)} where {_described(wanted)} are expected; it was written by "
                "another version: remove its unit and run again"
            )
        return file.read(list(columns) if columns is not None else None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"table {path} cannot be read ({str(error).splitlines()[0]}); remove its unit") from None


def field(name: str, kind: pa.DataType, *, nullable: bool = False) -> pa.Field:
    """A field that holds no nulls unless said so; pyarrow's own default is the opposite."""
    return pa.field(name, kind, nullable=nullable)


def _described(fields: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{name}: {kind}" for name, kind in fields.items()) + "}"
