"""ISO-C: isotropic merging in the common subspace.

Legend: B layers of equal shape, K experts, O output rows, I input columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.methods.matrices import LAYER_BYTES, by_layers, expert_layers, polar
from bd_core.methods.stream import EMBEDDINGS, Merged, StateDict, matrix_names

__all__ = ["iso_c"]


def iso_c(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    scale: float = 1.0,
    exclude: Sequence[str] = EMBEDDINGS,
    budget_bytes: int = LAYER_BYTES,
) -> Merged:
    """theta_0 + scale * mean(S) U V^T per matrix, U S V^T the SVD of sum_k tau_k: its spectrum made flat.

    Everything that is no matrix, and matrices whose names match `exclude`: theta_0 + mean_k tau_k.

    Source: Marczak et al., No Task Left Behind, ICML 2025 (Iso-C); `scale` is their alpha, tuned there on validation
    data, 1 in FusionBench. FusionBench flattens embeddings too; give `exclude=()` for that. Directions whose singular
    value is rounding (identical columns, a zero sum) stay zero and do not count in the mean (ours): an SVD would give
    them arbitrary vectors of full size.
    Cost: one eigendecomposition of the smaller side a matrix (an SVD where it is nearly square or ill-conditioned);
    a few buffers of `budget_bytes`, however many experts.
    """
    if not math.isfinite(scale):
        raise ValueError(f"iso_c: scale={scale} must be finite")

    def merge() -> Merged:
        def steps(names: list[str]) -> Tensor:
            return scale * _flattened(_total(base, experts, names))

        yield from by_layers(base, experts, matrix_names(base, exclude), budget_bytes, steps)

    return merge()


def _total(base: StateDict, experts: Sequence[StateDict], names: Sequence[str]) -> Float[Tensor, "B O I"]:
    layers = expert_layers(base, experts, names)
    total_BOI = next(layers).clone()
    for vectors_BOI in layers:
        total_BOI += vectors_BOI
    return total_BOI


def _flattened(total_BOI: Float[Tensor, "B O I"]) -> Float[Tensor, "B O I"]:
    """mean(S) U V^T of every matrix."""
    tall = total_BOI.shape[1] >= total_BOI.shape[2]
    factor = polar(total_BOI if tall else total_BOI.mT, total_BOI.dtype)
    count_B = (factor.values > 0).sum(1).clamp_min(1)
    mean_B = factor.values.sum(1) / count_B
    flat_BNC = torch.bmm(factor.left, factor.right * mean_B[:, None, None])
    return flat_BNC if tall else flat_BNC.mT
