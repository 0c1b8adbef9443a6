"""CSR neighbourhoods on disk: `offsets.npy`, `neighbours.npy`, `cosine.npy`."""

from pathlib import Path

import numpy as np
import torch

from bd_core.neighbourhood import Neighbourhoods
from pipeline.errors import DataError
from pipeline.formats.vectors import length_of, read_part, write_vectors
from pipeline.neighbourhoods.csr import Csr


def write_neighbourhoods(directory: Path, graph: Neighbourhoods, *, local: bool = False) -> None:
    """Write `graph` (int64, int64, float32) below `directory`; `local` neighbours are rows of a partition: int32."""
    write_vectors(directory / "offsets.npy", graph.offsets.numpy())
    write_vectors(directory / "neighbours.npy", graph.neighbours.numpy().astype(np.int32 if local else np.int64))
    write_vectors(directory / "cosine.npy", graph.cosine.numpy())


def read_neighbourhoods(directory: Path) -> Neighbourhoods:
    """The graph that lies in `directory`; checked as it is built."""
    return read_rows(directory, 0, length_of(directory / "offsets.npy") - 1)


def read_rows(directory: Path, start: int, stop: int) -> Neighbourhoods:
    """Anchors `start` to `stop - 1` of the graph in `directory`; only their part of the files is read."""
    try:
        return Neighbourhoods(*read_csr(directory, start, stop))
    except ValueError as error:
        raise DataError(f"{directory}: {error}; remove its unit and run again") from None


def read_csr(directory: Path, start: int, stop: int) -> Csr:
    """The same, and only the lengths of the files are checked."""
    files = [directory / f"{name}.npy" for name in ("offsets", "neighbours", "cosine")]
    n_offsets, n_neighbours, n_cosines = (length_of(file) for file in files)
    n_edges = int(read_part(files[0], n_offsets - 1, n_offsets)[0]) if n_offsets else -1
    if not 0 <= start < stop < n_offsets or n_neighbours != n_edges or n_cosines != n_edges:
        raise DataError(
            f"{directory} holds {n_offsets - 1} anchors, {n_neighbours} neighbours and {n_cosines} cosines; "
            f"anchors {start} to {stop} with {n_edges} edges are expected; remove its unit and run again"
        )
    offsets = read_part(files[0], start, stop + 1)
    edges = (int(offsets[0]), int(offsets[-1]))
    return Csr(
        torch.from_numpy(offsets - offsets[0]),
        torch.from_numpy(read_part(files[1], *edges).astype(np.int64, copy=False)),
        torch.from_numpy(read_part(files[2], *edges)),
    )
