"""CSR neighbourhoods on disk: `offsets.npy`, `neighbours.npy`, `cosine.npy`."""

from pathlib import Path

import torch

from bd_core.neighbourhood import Neighbourhoods
from pipeline.formats.vectors import read_vectors, write_vectors


def write_neighbourhoods(directory: Path, graph: Neighbourhoods) -> None:
    """Write `graph` (int64, int64, float32) below `directory`."""
    write_vectors(directory / "offsets.npy", graph.offsets.numpy())
    write_vectors(directory / "neighbours.npy", graph.neighbours.numpy())
    write_vectors(directory / "cosine.npy", graph.cosine.numpy())


def read_neighbourhoods(directory: Path) -> Neighbourhoods:
    """The graph that lies in `directory`; checked as it is built."""
    offsets, neighbours, cosine = (
        torch.from_numpy(read_vectors(directory / f"{name}.npy").copy()) for name in ("offsets", "neighbours", "cosine")
    )
    return Neighbourhoods(offsets, neighbours, cosine)
