"""L1 distances between the class probabilities at the two ends of edges, block by block.

Shapes: A anchors, N base rows, C classes, E edges of all, F edges of these anchors.
"""

from importlib.util import find_spec

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bd_core.graph_kernel import kernel_distance, kernel_runs

TORCH_COPIES = 3  # gathered rows that torch holds for an edge: the anchor's, the neighbour's, and one in the making


def triton_runs(*tensors: Tensor) -> bool:
    """Whether the GPU kernel can read these: CUDA, float32, each row's classes side by side, and Triton is there."""
    fit = all(t.is_cuda and t.dtype == torch.float32 and t.stride(1) == 1 for t in tensors)
    return fit and find_spec("triton") is not None


def distance_bytes(anchor_AC: Tensor, base_NC: Tensor) -> int:
    """What an edge costs in memory beside its result: nothing in the compiled kernels, some rows in torch."""
    fused = kernel_runs(anchor_AC, base_NC) or triton_runs(anchor_AC, base_NC)
    return 0 if fused else TORCH_COPIES * base_NC.shape[1] * base_NC.element_size()


def edge_distance(
    anchor_AC: Float[Tensor, "A C"],
    base_NC: Float[Tensor, "N C"],
    anchor_scale_A: Float[Tensor, " A"],
    base_scale_N: Float[Tensor, " N"],
    offsets: Int64[Tensor, " boundaries"],
    neighbours: Int64[Tensor, " E"],
    block_edges: int,
) -> Float[Tensor, " F"]:
    """sum_c |anchor_ic scale_i - base_jc scale_j| of the edges offsets[0] to offsets[-1], anchor after anchor.

    With alpha and 1 / S these are |p_i - p_j|_1, and no p is ever written. torch takes block_edges at a time.
    """
    first, last = int(offsets[0]), int(offsets[-1])
    distance_F = base_NC.new_empty(last - first)
    if kernel_runs(anchor_AC, base_NC):
        kernel_distance(anchor_AC, base_NC, anchor_scale_A, base_scale_N, offsets, neighbours, distance_F)
        return distance_F
    anchor_F = torch.repeat_interleave(offsets.diff())
    if triton_runs(anchor_AC, base_NC):
        from bd_core.edge_triton import triton_distance

        return triton_distance(anchor_AC, base_NC, anchor_scale_A, base_scale_N, anchor_F, neighbours[first:last])
    for start in range(0, last - first, block_edges):
        anchor, other = anchor_F[start : start + block_edges], neighbours[first + start : last][:block_edges]
        gap = anchor_AC[anchor].mul_(anchor_scale_A[anchor, None])
        gap -= base_NC[other].mul_(base_scale_N[other, None])
        distance_F[start : start + block_edges] = gap.abs_().sum(dim=1)
    return distance_F
