"""Parquet sources: rows by reference, splits, and what is wrong with a table."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.images import encode_png
from pipeline.data.items import Reject
from pipeline.data.parquet import ParquetSource
from pipeline.errors import ConfigError, DataError


def image(value: int) -> bytes:
    return encode_png(np.full((2, 2), value, dtype=np.uint8))


def write(path: Path, rows: int = 25, **replaced: list[object] | None) -> Path:
    columns: dict[str, list[object] | None] = {
        "image": [image(row) for row in range(rows)],
        "label": [row % 2 for row in range(rows)],
        "label_name": ["even" if row % 2 == 0 else "odd" for row in range(rows)],
        "split": ["test" if row % 5 == 0 else "train" for row in range(rows)],
        **replaced,
    }
    pq.write_table(pa.table({name: values for name, values in columns.items() if values}), path, row_group_size=7)
    return path


def test_rows_come_with_their_own_image_label_and_split(tmp_path: Path) -> None:
    source = ParquetSource(path=write(tmp_path / "a.parquet"))
    assert source.classes() == ("even", "odd")
    blocks = source.blocks(8)
    assert [block.id for block in blocks] == ["train-00000", "train-00001", "train-00002", "test-00000"]
    rows = []
    for block in blocks:
        for item, data in source.read(block):
            row = int(item.reference.removeprefix("a.parquet#"))
            assert data == image(row)
            assert item.label == ("odd" if row % 2 else "even")
            assert item.split == block.split == ("train" if row % 5 else "test")
            rows.append(row)
    assert sorted(rows) == list(range(25))


def test_a_folder_of_tables_is_one_source_and_a_touched_file_is_another_block(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet"):
        write(tmp_path / name, rows=10)
    source = ParquetSource(path=tmp_path, max_train=9)
    blocks = source.blocks(100)
    assert len(blocks[0].items) == 9
    assert len({item.reference for block in blocks for item in block.items}) == 9 + 4
    os.utime(tmp_path / "a.parquet", ns=(1, 1))
    assert source.blocks(100)[0].settings != blocks[0].settings


def test_without_a_split_column_rows_are_split_by_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows=100, split=None)
    with pytest.raises(ConfigError, match=r"no column 'split' among.*set split_column"):
        ParquetSource(path=path).blocks(10)
    source = ParquetSource(path=path, split_column=None, test_fraction=0.3)
    test = sum(len(block.items) for block in source.blocks(1000) if block.split == "test")
    assert 15 < test < 45


def test_unlabelled_tables_need_class_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", label_name=None)
    with pytest.raises(ConfigError, match="no column 'label_name'"):
        ParquetSource(path=path).classes()
    with pytest.raises(ConfigError, match="names no classes"):
        ParquetSource(path=path, label_column=None).classes()
    named = ParquetSource(path=path, label_column=None, class_names=("x", "y"))
    assert named.classes() == ("x", "y")
    assert {item.label for block in named.blocks(100) for item in block.items} == {None}


def test_rows_without_an_image_are_rejects(tmp_path: Path) -> None:
    images: list[object] = [image(0), None, b"", image(3)]
    path = write(tmp_path / "a.parquet", rows=4, image=images, split=["train"] * 4)
    (block,) = ParquetSource(path=path).blocks(10)
    read = [data for _, data in ParquetSource(path=path).read(block)]
    empty = Reject("the image column is empty in this row")
    assert read == [image(0), empty, empty, image(3)]


def test_unusable_tables_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.parquet does not exist"):
        ParquetSource(path=tmp_path / "nowhere.parquet").blocks(10)
    with pytest.raises(ConfigError, match=r"holds no \.parquet files"):
        ParquetSource(path=tmp_path).blocks(10)
    torn = write(tmp_path / "torn.parquet")
    torn.write_bytes(torn.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"torn\.parquet: not a readable Parquet file"):
        ParquetSource(path=torn).blocks(10)
    odd = write(tmp_path / "odd.parquet", rows=2, split=["train", "val"])
    with pytest.raises(DataError, match=r"odd\.parquet row 1: split 'val'"):
        ParquetSource(path=odd).blocks(10)
    (tmp_path / "none").mkdir()
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none" / "a.parquet")
    empty = ParquetSource(path=tmp_path / "none", label_column=None, split_column=None, class_names=("x",))
    with pytest.raises(ConfigError, match="has no rows"):
        empty.blocks(10)
