"""Model inputs by row number, decoded from shards when they are asked for and kept within a memory budget."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.formats.shards import ShardReader


class ImageBank:
    """Rows 0..n-1 of several shards, in the order of the shards and of the samples in each.

    `decode` turns an encoded image into a uint8 [S,S,3] array, equal for equal bytes. Batches do not depend on what
    is in memory. Not for several threads at once.
    """

    def __init__(
        self, shards: Sequence[Path], decode: Callable[[bytes], NDArray[np.uint8]], *, budget_bytes: int = 2**30
    ) -> None:
        self._readers = [ShardReader(path) for path in shards]
        self._ends = list(accumulate(len(reader) for reader in self._readers))
        self._decode = decode
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()  # the least recently used first
        self._kept_bytes = 0

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def kept_bytes(self) -> int:
        """Decoded bytes in memory now."""
        return self._kept_bytes

    def batch(self, rows: Sequence[int] | NDArray[np.int64] | Tensor) -> Tensor:
        """uint8 [B,S,S,3] of the given rows, in their order; a row may occur more than once."""
        return torch.from_numpy(np.stack([self._image(int(row)) for row in rows]))

    def close(self) -> None:
        """Close the shards."""
        for reader in self._readers:
            reader.close()

    def _image(self, row: int) -> NDArray[np.uint8]:
        if row in self._kept:
            self._kept.move_to_end(row)
            return self._kept[row]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of an image bank with {len(self)} rows")
        shard = int(np.searchsorted(self._ends, row, side="right"))
        start = self._ends[shard - 1] if shard else 0
        pixels = self._decode(self._readers[shard].image(row - start))
        self._kept[row] = pixels
        self._kept_bytes += pixels.nbytes
        while self._kept_bytes > self._budget_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= dropped.nbytes
        return pixels
