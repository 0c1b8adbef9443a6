"""RegMean: the linear regression of every expert's outputs on its inputs.

Legend: K experts, O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.methods.matrices import expert_layers, right_solve
from bd_core.methods.stream import EMBEDDINGS, Merged, StateDict, averaged, finish, matrix_names, merged_names, unmerged

__all__ = ["check_grams", "gram_of", "regmean"]


def regmean(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    grams: Mapping[str, Tensor],
    diagonal_share: float = 0.1,
    exclude: Sequence[str] = EMBEDDINGS,
) -> Merged:
    """(sum_k W_k G_k) (sum_k G_k)^-1 per matrix that has Gram matrices G_k = X_k^T X_k / n_k [K, I, I] of its inputs.

    G_k is first made (1 - diagonal_share) G_k + diagonal_share diag(G_k). Everything else: the mean of the experts.

    Source: Jin et al., RegMean, ICLR 2023, which multiplies off-diagonal entries by 0.9 (0.1 for T5); FusionBench's
    factor for CLIP is 0.95. Computed as mean_k W_k + (sum_k (W_k - mean) G_k) (sum_k G_k)^+: the same where the sum is
    regular, and the mean in input directions that no sample used (ours), where the inverse does not exist.
    Cost: K products [O, I] [I, I] and one Cholesky solve in float64 a matrix; one matrix and its Gram sum at a time.
    Raises ValueError where Gram matrices do not fit their weight, are not finite, or none belongs to a matrix.
    """
    if not 0 <= diagonal_share <= 1:
        raise ValueError(f"regmean: diagonal_share={diagonal_share} must lie in [0, 1]")

    def merge() -> Merged:
        regressed = check_grams("regmean", base, grams, exclude)
        for name in regressed:
            yield name, finish(base[name], _regression(base, experts, name, grams, diagonal_share))
        done = set(regressed)
        yield from averaged(base, experts, [name for name in merged_names(base) if name not in done])
        yield from unmerged(base, experts)

    return merge()


def check_grams(method: str, base: StateDict, grams: Mapping[str, Tensor], exclude: Sequence[str]) -> list[str]:
    """The matrices of the base that have Gram matrices; ValueError where none has."""
    found = [name for name in matrix_names(base, exclude) if name in grams]
    if not found:
        raise ValueError(
            f"{method}: none of the {len(grams)} Gram matrices belongs to a matrix of the base; key them by the names "
            "of the weights"
        )
    return found


def gram_of(method: str, name: str, grams: Mapping[str, Tensor], n_experts: int, width: int) -> Float[Tensor, "K I I"]:
    """The Gram matrices of one weight with `width` columns; ValueError where they do not fit it or are not finite."""
    gram_KII = grams[name]
    if gram_KII.shape != (n_experts, width, width):
        raise ValueError(
            f"{method}: the Gram matrices of {name} are {list(gram_KII.shape)}, its weight and {n_experts} experts "
            f"need {[n_experts, width, width]}; gather them again with these experts"
        )
    if not bool(torch.isfinite(gram_KII.sum())):
        raise ValueError(
            f"{method}: the Gram matrices of {name} {list(gram_KII.shape)} hold NaN or infinities; leave out the "
            "samples whose activations overflow"
        )
    return gram_KII


def _regression(
    base: StateDict, experts: Sequence[StateDict], name: str, grams: Mapping[str, Tensor], diagonal_share: float
) -> Float[Tensor, "O I"]:
    gram_KII = gram_of("regmean", name, grams, len(experts), base[name].shape[1])
    mean_OI = total_II = product_OI = torch.zeros((), device=base[name].device)
    for own_II, vectors_BOI in zip(gram_KII, expert_layers(base, experts, [name]), strict=True):
        wide_II = own_II.to(vectors_BOI)
        shrunk_II = (1 - diagonal_share) * wide_II + diagonal_share * torch.diag(wide_II.diagonal())
        mean_OI = mean_OI + vectors_BOI[0] / len(experts)
        total_II = total_II + shrunk_II
        product_OI = product_OI + vectors_BOI[0] @ shrunk_II
    return mean_OI + right_solve((product_OI - mean_OI @ total_II)[None], total_II[None])[0]
