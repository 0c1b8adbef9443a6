"""Arrays in .npy files, read by memory map."""

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
        raise DataError(f"array {path} cannot be read ({error}); remove its unit and run again") from None
    if ndim is not None and array.ndim != ndim:
        raise DataError(f"array {path} has shape {array.shape} where {ndim} dimensions are expected; remove its unit")
    return array
