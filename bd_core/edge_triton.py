"""L1 distances between gathered rows on a GPU: rows are read, compared and summed on chip, and only sums are written.

Imported by `edge_distance.py` where Triton is installed; not yet measured on a GPU. A program takes a few edges and
goes over their classes. Shapes: A anchors, N base rows, C classes, F edges.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int64
from torch import Tensor

__all__ = ["triton_distance"]

EDGES, CLASSES, WARPS = 8, 256, 4  # of a step: a row in 16-byte loads, 8 edges of one anchor that share its row


def triton_distance(
    anchor_AC: Float32[Tensor, "A C"],
    base_NC: Float32[Tensor, "N C"],
    anchor_scale_A: Float32[Tensor, " A"],
    base_scale_N: Float32[Tensor, " N"],
    anchor_F: Int64[Tensor, " F"],
    neighbours_F: Int64[Tensor, " F"],
) -> Float32[Tensor, " F"]:
    """sum_c |anchor_ic scale_i - base_jc scale_j| of the edges (i, j); 0 for equal rows of equal scale."""
    distance_F = base_NC.new_empty(len(neighbours_F))
    with torch.cuda.device_of(base_NC):  # type: ignore[no-untyped-call]
        _distance[(triton.cdiv(len(neighbours_F), EDGES),)](
            *(anchor_AC, base_NC, anchor_scale_A, base_scale_N, anchor_F, neighbours_F, distance_F),
            *(len(neighbours_F), base_NC.shape[1], anchor_AC.stride(0), base_NC.stride(0)),
            N_EDGES=EDGES,
            N_CLASSES=CLASSES,
            num_warps=WARPS,
            enable_fp_fusion=False,  # fused, a product and a difference would not be 0 for equal rows
        )
    return distance_F


@triton.jit
@no_type_check
def _distance(
    anchor_at,
    base_at,
    anchor_scale_at,
    base_scale_at,
    anchor_of_at,
    neighbours_at,
    distance_at,
    n_edges,
    n_classes,
    anchor_row,
    base_row,
    N_EDGES: tl.constexpr,
    N_CLASSES: tl.constexpr,
):
    edge = tl.program_id(0) * N_EDGES + tl.arange(0, N_EDGES)
    there = edge < n_edges
    i = tl.load(anchor_of_at + edge, mask=there, other=0)
    j = tl.load(neighbours_at + edge, mask=there, other=0)
    own, other = tl.load(anchor_scale_at + i)[:, None], tl.load(base_scale_at + j)[:, None]
    total = tl.zeros([N_EDGES], dtype=tl.float32)
    for start in range(0, n_classes, N_CLASSES):
        column = start + tl.arange(0, N_CLASSES)
        inside = there[:, None] & (column < n_classes)[None, :]
        p = tl.load(anchor_at + i[:, None] * anchor_row + column[None, :], mask=inside, other=0.0) * own
        q = tl.load(base_at + j[:, None] * base_row + column[None, :], mask=inside, other=0.0) * other
        total += tl.sum(tl.abs(p - q), 1)
    tl.store(distance_at + edge, total, mask=there)
