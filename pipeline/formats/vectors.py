"""Arrays in .npy files, read by memory map."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError


def write_vectors(path: Path, array: NDArray[Any]) -> None:
    """Write `array` in C order; equal values give equal bytes. Object arrays are refused."""
    np.save(path, np.ascontiguousarray(array), allow_pickle=False)


def read_vectors(path: Path, *, ndim: int | None = None, mmap: bool = True) -> NDArray[Any]:
    """The array in `path`: mapped and read-only, or in memory where `mmap` is off.

    Raises DataError for a file that is cut short, is no .npy, holds pickled objects or has not `ndim` dimensions.
    """
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from None
    if ndim is not None and array.ndim != ndim:
        raise DataError(f"array {path} has shape {array.shape} where {ndim} dimensions are expected; remove its unit")
    return array


def length_of(path: Path) -> int:
    """How many elements the one-dimensional array in `path` has; raises as `read_part`."""
    return _layout(path, _size(path))[1]


def read_part(path: Path, start: int, stop: int) -> NDArray[Any]:
    """Elements `start` to `stop - 1` of a one-dimensional array, in memory; nothing else is read.

    Many small parts are read many times faster so than through memory maps. Raises DataError as `read_vectors`, and
    where the file is shorter or longer than its header says.
    """
    dtype, length, first = _layout(path, _size(path))
    if not 0 <= start <= stop <= length:
        raise DataError(f"array {path} has {length} elements, {start} to {stop} are asked for; remove its unit")
    return np.fromfile(path, dtype=dtype, count=stop - start, offset=first + start * dtype.itemsize)


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"array {path} cannot be read ({error}); remove its unit and run again")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from None


@lru_cache(maxsize=4096)
def _layout(path: Path, size: int) -> tuple[np.dtype[Any], int, int]:
    """dtype, length and first byte of a one-dimensional array in a file of this size; committed files never change."""
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)  # what `write_vectors` writes
            first = file.tell()
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from None
    if len(shape) != 1 or dtype.hasobject or first + shape[0] * dtype.itemsize != size:
        array = read_vectors(path, ndim=1)  # says what is wrong with it
        raise DataError(f"array {path} has bytes beyond its {len(array)} elements; remove its unit and run again")
    return dtype, shape[0], first
