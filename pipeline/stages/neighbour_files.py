"""CSR neighbourhoods on disk: `offsets.npy`, `neighbours.npy`, `cosine.npy`."""

from pathlib import Path

import numpy as np
import torch

from bd_core.neighbourhood import Neighbourhoods
from pipeline.errors import DataError
from pipeline.formats.vectors import read_vectors, write_vectors


def write_neighbourhoods(directory: Path, graph: Neighbourhoods, *, local: bool = False) -> None:
    """Write `graph` (int64, int64, float32) below `directory`; `local` neighbours are rows of a partition: int32."""
    write_vectors(directory / "offsets.npy", graph.offsets.numpy())
    write_vectors(directory / "neighbours.npy", graph.neighbours.numpy().astype(np.int32 if local else np.int64))
    write_vectors(directory / "cosine.npy", graph.cosine.numpy())


def read_neighbourhoods(directory: Path) -> Neighbourhoods:
    """The graph that lies in `directory`; checked as it is built."""
    return read_rows(directory, 0, len(read_vectors(directory / "offsets.npy", ndim=1)) - 1)


def read_rows(directory: Path, start: int, stop: int) -> Neighbourhoods:
    """Anchors `start` to `stop - 1` of the graph in `directory`; only their part of the files is read."""
    offsets, neighbours, cosine = (
        read_vectors(directory / f"{name}.npy", ndim=1) for name in ("offsets", "neighbours", "cosine")
    )
    if not 0 <= start < stop < len(offsets) or len(neighbours) != offsets[-1] or len(cosine) != offsets[-1]:
        raise DataError(
            f"{directory} holds {len(offsets) - 1} anchors, {len(neighbours)} neighbours and {len(cosine)} cosines; "
            f"anchors {start} to {stop} with {offsets[-1]} edges are expected; remove its unit and run again"
        )
    edges = slice(int(offsets[start]), int(offsets[stop]))
    try:
        return Neighbourhoods(
            torch.from_numpy(offsets[start : stop + 1] - offsets[start]),
            torch.from_numpy(neighbours[edges].astype(np.int64)),
            torch.from_numpy(np.array(cosine[edges])),
        )
    except ValueError as error:
        raise DataError(f"{directory}: {error}; remove its unit and run again") from None
