"""Twin-Merging: a shared model plus compressed exclusive knowledge, added per sample.

Legend: K experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from bd_core.compression import CompressedVectors, svd_compress
from bd_core.methods.averages import task_arithmetic
from bd_core.task_vectors import check_compatible, task_vectors

__all__ = ["TwinMerging", "twin_merging"]

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class TwinMerging:
    """The two parts of a Twin-merged model: `MergedModel(model, twin.shared, twin.exclusive)` runs it."""

    shared: dict[str, Tensor]
    exclusive: CompressedVectors


def twin_merging(
    base: StateDict, experts: Sequence[StateDict], *, scale: float = 0.3, rank_share: float = 0.2
) -> TwinMerging:
    """The shared theta_s and the exclusive v_k of theta(x) = theta_s + sum_k w_k(x) v_k.

    theta_s = theta_0 + scale * sum_k tau_k; v_k = theta_k - theta_s, every matrix cut by SVD.

    w = softmax(router(x)). **The router is supervised by the task a sample came from**: unlike BD-Merging and
    AdaMerging this method uses task labels (not class labels). It is fitted elsewhere; here are the weights only.

    Source: Lu et al., Twin-Merging, NeurIPS 2024. `scale` 0.3 as Task Arithmetic's for eight tasks; `rank_share`, the
    share of singular triplets of each matrix that v_k keeps, is 0.2 (ours; the paper reports a range of ranks).
    Cost: K singular value decompositions of every matrix; storage about rank_share * (O + I)/max(O, I) of K experts.
    """
    check_compatible(base, experts)
    shared = dict(task_arithmetic(base, experts, scale=scale))
    return TwinMerging(shared, svd_compress(task_vectors(shared, experts), rank_share=rank_share))
