"""Parquet tables of encoded images, one row an image."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline.config import UserPath
from pipeline.data.items import Block, Item, Reject, Split, draw_splits, listed_blocks, split_by_hash
from pipeline.data.source import Source
from pipeline.errors import ConfigError, DataError


class ParquetSource(Source):
    """The rows of one Parquet file, or of every .parquet file of a folder.

    `image_column` holds encoded files. Without a split column, `test_fraction` of the rows is the test split, chosen
    by a hash of file name and row. A column that is set to null in the configuration is not looked for.
    """

    kind: Literal["parquet"] = "parquet"
    path: UserPath
    image_column: str = "image"
    label_column: str | None = "label_name"
    split_column: str | None = "split"
    test_fraction: float = Field(default=0.2, ge=0.0, le=1.0)
    class_names: tuple[str, ...] = ()

    def classes(self) -> tuple[str, ...]:
        """`class_names` where given, otherwise the distinct labels, sorted."""
        if self.class_names:
            return self.class_names
        found = {item.label for item in self._items() if item.label is not None}
        if not found:
            raise ConfigError(
                f"{self.path} names no classes (label_column: {self.label_column!r}); list class_names in "
                "the configuration"
            )
        return tuple(sorted(found))

    def blocks(self, rows: int) -> list[Block]:
        """Blocks in the order of the rows. A file counts as changed when its size or its time of change differ."""
        items = draw_splits(self._items(), self.max_train, self.max_test, self.draw_seed)
        if not items:
            raise ConfigError(f"{self.path} has no rows; correct the path")
        return listed_blocks("parquet", items, rows)

    def read(self, block: Block) -> Iterator[tuple[Item, bytes | Reject]]:
        """The image column of the block's rows; only row groups that hold one of them are read."""
        files = {file.name: file for file in self._files()}
        for name, group in groupby(block.items, key=lambda item: item.reference.rpartition("#")[0]):
            items = {int(item.reference.rpartition("#")[2]): item for item in group}
            yield from self._read_rows(files[name], items)

    def size_bytes(self) -> float | None:
        """Bytes of the files, other columns included."""
        return float(sum(path.stat().st_size for path in self._files()))

    def _read_rows(self, path: Path, items: dict[int, Item]) -> Iterator[tuple[Item, bytes | Reject]]:
        file = _open(path)
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            if any(start <= row < end for row in items):
                column = _read(file, path, [self.image_column], group).column(0)
                for row in range(start, end):
                    if row in items:
                        value = column[row - start].as_py()
                        yield items[row], value if value else Reject("the image column is empty in this row")
            start = end

    def _files(self) -> list[Path]:
        if self.path.is_dir():
            files = sorted(self.path.glob("*.parquet"))
            if not files:
                raise ConfigError(f"folder {self.path} holds no .parquet files; correct the path")
            return files
        if not self.path.is_file():
            raise ConfigError(f"parquet file {self.path} does not exist; correct the path")
        return [self.path]

    def _items(self) -> Iterator[Item]:
        for path in self._files():
            file = _open(path)
            named = {"image": self.image_column, "label": self.label_column, "split": self.split_column}
            wanted = {role: column for role, column in named.items() if column is not None}
            missing = {role: column for role, column in wanted.items() if column not in file.schema_arrow.names}
            if missing:
                raise ConfigError(
                    f"{path}: no column {', '.join(repr(column) for column in missing.values())} among "
                    f"{file.schema_arrow.names}; set {', '.join(f'{role}_column' for role in missing)}"
                )
            state = path.stat()
            fingerprint = f"{state.st_size}-{state.st_mtime_ns}"
            columns = [column for role, column in wanted.items() if role != "image"]
            table = _read(file, path, columns)
            for row in range(file.metadata.num_rows):
                label = table[self.label_column][row].as_py() if self.label_column else None
                split = table[self.split_column][row].as_py() if self.split_column else None
                yield Item(
                    f"{path.name}#{row}",
                    self._split(split, path, row),
                    None if label is None else str(label),
                    fingerprint,
                )

    def _split(self, value: Any, path: Path, row: int) -> Split:
        if self.split_column is None:
            return split_by_hash(f"{path.name}#{row}", self.test_fraction)
        if value == "train" or value == "test":
            return "train" if value == "train" else "test"
        raise DataError(
            f"{path} row {row}: split {value!r} in column {self.split_column!r} is neither 'train' nor 'test'; correct "
            "it, or set split_column to null for a split by hash"
        )


def _open(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({_first_line(error)}); write or copy it again") from None


def _read(file: Any, path: Path, columns: list[str], group: int | None = None) -> Any:
    import pyarrow as pa

    try:
        return file.read(columns) if group is None else file.read_row_group(group, columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: {columns} cannot be read ({_first_line(error)}); write or copy it again") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
