"""Model Stock: every tensor as far from the pretrained one as its experts agree.

Legend: K experts, n entries of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from bd_core.methods.stream import Merged, StateDict, chunks, entrywise, merged_names, unmerged

__all__ = ["model_stock"]

# 1 + (K - 1) cos below this: the experts cancel, and no finite step is defined (mergekit's bound).
SINGULAR = 1e-6


def model_stock(
    base: StateDict, experts: Sequence[StateDict], *, average: Literal["cosine", "angle"] = "cosine"
) -> Merged:
    """theta_0 + t * mean_k tau_k with t = K cos / (1 + (K - 1) cos), one cosine a tensor.

    cos is the cosine between two task vectors of the tensor (zero vectors count as orthogonal). The paper leaves open
    which one stands for K > 2 experts: `average="cosine"` takes the mean of the pairwise cosines, as mergekit, and
    "angle" the cosine of the mean pairwise angle, as FusionBench; for K = 2 they are the same. t may be negative, as
    in both: agreeing experts have cos in (0, 1). Where the experts cancel (1 + (K - 1) cos < 1e-6) the tensor stays
    the base's (as mergekit), and one expert alone is given back whole (ours; both refuse it). FusionBench adds 1e-8
    to the product of the norms and mergekit raises it to 1e-6, which shows in tensors that hardly moved; not here.

    Source: Jang et al., Model Stock, ECCV 2024. No setting but `average`.
    Cost: two passes over the tensors, K^2 / 2 products of each; beside in- and output a chunk of task vectors.
    """
    if average not in ("cosine", "angle"):
        raise ValueError(f"model_stock: average={average!r} must be cosine or angle")

    def stream() -> Merged:
        ratio = 0.0

        def step(vectors_Kn: Tensor, name: str, start: int) -> Tensor:
            nonlocal ratio
            if start == 0:
                ratio = _ratio(_products(base, experts, name, vectors_Kn), average)
            return vectors_Kn.mean(0).mul_(ratio)

        yield from entrywise(base, experts, merged_names(base), step)
        yield from unmerged(base, experts)

    return stream()


def _products(
    base: StateDict, experts: Sequence[StateDict], name: str, first_Kn: Float[Tensor, "K n"]
) -> Float[Tensor, "K K"]:
    """<tau_j, tau_k> of one tensor in float64; a tensor longer than its first chunk is read through once more."""
    wide_Kn = first_Kn.double()
    total_KK = wide_Kn @ wide_Kn.T
    if first_Kn.shape[1] < base[name].numel():
        for _, start, vectors_Kn in chunks(base, experts, [name]):
            if start > 0:
                wide_Kn = vectors_Kn.double()
                total_KK += wide_Kn @ wide_Kn.T
    return total_KK


def _ratio(products_KK: Float[Tensor, "K K"], average: str) -> float:
    """t."""
    products = products_KK.tolist()
    n_experts = len(products)
    if n_experts == 1:
        return 1.0
    cosines = [
        max(-1.0, min(1.0, products[j][k] / norm))
        if (norm := math.sqrt(products[j][j]) * math.sqrt(products[k][k])) > 0
        else 0.0
        for j, k in combinations(range(n_experts), 2)
    ]
    if average == "cosine":
        cosine = sum(cosines) / len(cosines)
    else:
        cosine = math.cos(sum(math.acos(value) for value in cosines) / len(cosines))
    denominator = 1 + (n_experts - 1) * cosine
    return n_experts * cosine / denominator if denominator >= SINGULAR else 0.0
