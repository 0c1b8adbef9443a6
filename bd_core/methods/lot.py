"""LOT Merging: layer-wise optimal task vectors, least squares on the drift of features.

Legend: K experts, O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.methods.matrices import expert_layers, right_solve
from bd_core.methods.regmean import check_grams, gram_of
from bd_core.methods.stream import (
    EMBEDDINGS,
    Merged,
    StateDict,
    averaged,
    expert_vectors,
    finish,
    merged_names,
    unmerged,
)

__all__ = ["lot"]


def lot(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    grams: Mapping[str, Tensor],
    squares: Mapping[str, Tensor] | None = None,
    exclude: Sequence[str] = EMBEDDINGS,
) -> Merged:
    """theta_0 + T*, T* the task vector whose features are nearest to all experts': least squares, layer by layer.

    Matrices with Gram matrices G_k = X_k^T X_k / n_k [K, I, I]: T* = (sum_k T_k G_k) (sum_k G_k)^+.
    Element-wise scales of norms with mean squared inputs s_k, `squares` [K, I]: T* = sum_k s_k T_k / sum_k s_k.
    Everything else (biases, embeddings, scales whose input was always 0): the mean of the task vectors.

    Source: Sun et al., Towards Minimizing Feature Drift in Model Merging (LOT Merging), NeurIPS 2025; 16 to 64
    unlabelled samples a task there. Written with X_k^T X_k, which is n G_k for equally many samples a task.
    Cost: K products [O, I] [I, I] and one solve in float64 a matrix (an eigendecomposition where the sum is singular).
    Raises ValueError where Gram matrices or squares do not fit their weight, or none belongs to a matrix.
    """

    def merge() -> Merged:
        regressed = check_grams("lot", base, grams, exclude)
        names = merged_names(base)
        scales = [name for name in names if squares is not None and name in squares and base[name].ndim == 1]
        for name in regressed:
            yield name, finish(base[name], _regression(base, experts, name, grams))
        for name in scales:
            assert squares is not None
            yield name, finish(base[name], _weighted(name, expert_vectors(base, experts, name), squares[name]))
        done = {*regressed, *scales}
        yield from averaged(base, experts, [name for name in names if name not in done])
        yield from unmerged(base, experts)

    return merge()


def _regression(
    base: StateDict, experts: Sequence[StateDict], name: str, grams: Mapping[str, Tensor]
) -> Float[Tensor, "O I"]:
    gram_KII = gram_of("lot", name, grams, len(experts), base[name].shape[1])
    total_II = product_OI = torch.zeros((), device=base[name].device)
    for own_II, vectors_BOI in zip(gram_KII, expert_layers(base, experts, [name]), strict=True):
        total_II = total_II + own_II.to(vectors_BOI)
        product_OI = product_OI + vectors_BOI[0] @ own_II.to(vectors_BOI)
    return right_solve(product_OI[None], total_II[None])[0]


def _weighted(name: str, vectors_KI: Float[Tensor, "K I"], squares_KI: Tensor) -> Float[Tensor, " I"]:
    if squares_KI.shape != vectors_KI.shape:
        raise ValueError(
            f"lot: the squares of {name} are {list(squares_KI.shape)}, its scale and the experts need "
            f"{list(vectors_KI.shape)}; gather them again with these experts"
        )
    weights_KI = squares_KI.to(vectors_KI)
    total_I = weights_KI.sum(0)
    return torch.where(total_I > 0, (weights_KI * vectors_KI).sum(0) / total_I, vectors_KI.mean(0))
