"""Tables and arrays: equal content gives equal bytes, other schemas and torn files are said to be so."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import DataError
from pipeline.formats.tables import field, read_table, write_table
from pipeline.formats.vectors import read_vectors, write_vectors

SCHEMA = pa.schema(
    [field("row", pa.int64()), field("label", pa.int32(), nullable=True), field("weights", pa.list_(pa.float32()))]
)
COLUMNS = {"row": np.arange(3), "label": [1, None, 2], "weights": [[0.5, 0.5], [], [1.0]]}


def test_tables_round_trip_with_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_table(tmp_path / name, SCHEMA, COLUMNS)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    table = read_table(tmp_path / "one", SCHEMA)
    assert table.to_pydict() == {"row": [0, 1, 2], "label": [1, None, 2], "weights": [[0.5, 0.5], [], [1.0]]}
    assert read_table(tmp_path / "one", SCHEMA, ["label"]).column_names == ["label"]


def test_empty_table_keeps_its_schema(tmp_path: Path) -> None:
    write_table(tmp_path / "empty", SCHEMA, {"row": [], "label": [], "weights": []})
    assert read_table(tmp_path / "empty", SCHEMA).num_rows == 0


def test_what_does_not_fit_the_schema_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not the schema's"):
        write_table(tmp_path / "t", SCHEMA, {"row": [1]})
    with pytest.raises(AssertionError, match="'row' has 1 nulls"):
        write_table(tmp_path / "t", SCHEMA, {**COLUMNS, "row": [0, None, 2]})
    with pytest.raises(pa.ArrowInvalid):
        write_table(tmp_path / "t", SCHEMA, {**COLUMNS, "row": [0, 1]})
    assert not (tmp_path / "t").exists()


def test_another_schema_or_a_torn_file_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_table(path, SCHEMA, COLUMNS)
    with pytest.raises(DataError, match=r"t\.parquet: columns.*row: int64.*another version"):
        read_table(path, pa.schema([field("row", pa.int32())]))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"t\.parquet cannot be read"):
        read_table(path, SCHEMA)
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "nowhere", SCHEMA)


def test_vectors_round_trip_mapped_and_equal(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_vectors(tmp_path / "one.npy", array)
    write_vectors(tmp_path / "two.npy", np.asfortranarray(array))
    assert (tmp_path / "one.npy").read_bytes() == (tmp_path / "two.npy").read_bytes()
    mapped = read_vectors(tmp_path / "one.npy", ndim=2)
    assert isinstance(mapped, np.memmap) and not mapped.flags.writeable
    assert np.array_equal(mapped, array)
    assert not isinstance(read_vectors(tmp_path / "one.npy", mmap=False), np.memmap)
    write_vectors(tmp_path / "empty.npy", np.zeros((0, 4)))
    assert read_vectors(tmp_path / "empty.npy").shape == (0, 4)


def test_arrays_that_cannot_be_used_are_data_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    write_vectors(path, np.zeros((3, 4)))
    with pytest.raises(DataError, match=r"shape \(3, 4\) where 1 dim"):
        read_vectors(path, ndim=1)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"a\.npy cannot be read"):
        read_vectors(path)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        read_vectors(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_vectors(tmp_path / "nowhere.npy")
    with pytest.raises(ValueError, match="Object arrays"):
        write_vectors(tmp_path / "b.npy", np.array([{}], dtype=object))
