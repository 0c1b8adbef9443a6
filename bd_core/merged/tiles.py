"""Tiles of merged weights in plain torch.

Legend: R rows of a tile, S samples of a tile, K experts; `...` the rest of a parameter's shape.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["form_tile", "tiles"]

# A merged tile must still be in cache when the product reads it. Measured with infra/bench/bench_merged.py.
TILE_BYTES = 2 << 20
MAX_SAMPLES = 16


def tiles(n_samples: int, n_rows: int, row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """(rows, samples) blocks that cover all rows of all samples; samples run fastest, so vectors are read once."""
    n_samples_tile = min(n_samples, MAX_SAMPLES)
    n_rows_tile = max(1, min(n_rows, TILE_BYTES // max(1, n_samples_tile * row_bytes)))
    for row in range(0, n_rows, n_rows_tile):
        for sample in range(0, n_samples, n_samples_tile):
            yield slice(row, min(row + n_rows_tile, n_rows)), slice(sample, min(sample + n_samples_tile, n_samples))


def form_tile(
    weights_SK: Float[Tensor, "S K"], base_RI: Float[Tensor, "R ..."], vectors_KRI: Float[Tensor, "K R ..."]
) -> Float[Tensor, "S R ..."]:
    """Merged rows of the samples: one matrix product of weights by flattened task-vector rows, in the base's dtype."""
    flat = torch.addmm(base_RI.reshape(1, -1), weights_SK, vectors_KRI.flatten(1).to(base_RI.dtype))
    return flat.view(len(weights_SK), *base_RI.shape)
