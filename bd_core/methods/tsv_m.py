"""TSV-M: task singular vectors, cut and made orthogonal to each other.

Legend: B layers of equal shape, K experts, O output rows, I input columns, R singular directions kept of each expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.methods.matrices import LAYER_BYTES, by_layers, expert_layers, leading_part, polar
from bd_core.methods.stream import EMBEDDINGS, Merged, StateDict, matrix_names

__all__ = ["tsv_m"]


def tsv_m(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    scale: float = 1.0,
    exclude: Sequence[str] = EMBEDDINGS,
    budget_bytes: int = LAYER_BYTES,
) -> Merged:
    """theta_0 + scale * U' S V'^T per matrix: every expert's leading directions, made orthogonal to the others'.

    U_k S_k V_k^T are the leading R = floor(min(O, I) / K) singular triplets of tau_k; U and V their concatenations
    over k, S block-diagonal, and U', V' the polar factors (nearest matrices with orthonormal columns) of U and V.
    Everything that is no matrix, and matrices whose names match `exclude`: theta_0 + mean_k tau_k.

    Source: Gargiulo et al., Task Singular Vectors, CVPR 2025 (TSV-Merge), `scale` 1 theirs. FusionBench treats
    embeddings as matrices too (`exclude=()`), and with more experts than the rank silently gives a zero delta; here
    that is a ValueError naming the matrix. Directions a task vector does not have (a zero or low-rank one) are left
    out, and experts that share directions share their weight (ours): an SVD would fill in arbitrary vectors.
    Cost: K eigendecompositions of the smaller side a matrix and two polar factors, where FusionBench takes K + 2 SVDs;
    a few buffers of `budget_bytes` for each of up to four threads, however many experts.
    """
    if not math.isfinite(scale):
        raise ValueError(f"tsv_m: scale={scale} must be finite")

    def merge() -> Merged:
        matrices = matrix_names(base, exclude)
        _check_ranks(base, matrices, len(experts))

        def steps(names: list[str]) -> Tensor:
            return scale * _orthogonal_sum(base, experts, names)

        yield from by_layers(base, experts, matrices, budget_bytes, steps, beside=True)

    return merge()


def _check_ranks(base: StateDict, matrices: Sequence[str], n_experts: int) -> None:
    for name in matrices:
        if min(base[name].shape) < n_experts:
            raise ValueError(
                f"tsv_m: {name} {list(base[name].shape)} has rank {min(base[name].shape)} at most, fewer directions "
                f"than the {n_experts} experts; merge fewer experts or leave the matrix out by `exclude`"
            )


def _orthogonal_sum(base: StateDict, experts: Sequence[StateDict], names: Sequence[str]) -> Float[Tensor, "B O I"]:
    """U' S V'^T of these layers.

    Turning U_k and V_k within their subspaces, with S_k turned likewise, changes nothing: any orthonormal bases of
    the leading subspaces do, and the core S_k is then full instead of diagonal.
    """
    n_rows, n_columns = base[names[0]].shape
    rank = min(n_rows, n_columns) // len(experts)

    layers = expert_layers(base, experts, names)
    parts = (leading_part(each if n_rows >= n_columns else each.mT, rank) for each in layers)
    lefts, cores, rights = (list(each) for each in zip(*parts, strict=True))
    # Bases of K experts that fill the space lie close to a singular matrix: their polar factors start from float64.
    dtype = cores[0].dtype
    long, short = polar(torch.cat(lefts, 2), dtype), polar(torch.cat(rights, 2), dtype)
    # S V'^T = (S right_V^T) left_V^T: the small factors first, the long side once.
    blocks = torch.split(short.right.mT, rank, dim=1)
    middle = torch.cat([torch.bmm(core, rows) for core, rows in zip(cores, blocks, strict=True)], 1)
    inner_BCC = torch.bmm(torch.bmm(long.right, middle), short.left.mT)
    result_BNC = torch.bmm(long.left, inner_BCC)
    return result_BNC if n_rows >= n_columns else result_BNC.mT
