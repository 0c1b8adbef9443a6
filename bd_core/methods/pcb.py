"""PCB-Merging: parameter competition balancing.

Legend: K experts, n entries of a chunk, N all merged entries of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.methods.selection import kth_smallest_rows
from bd_core.methods.stream import Merged, StateDict, chunks, entrywise, merged_names, unmerged

__all__ = ["pcb"]

Agreement = Literal["sum", "normalised"]


def pcb(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    keep: float = 0.05,
    scale: float = 1.2,
    clamp: float = 0.01,
    agreement: Agreement = "sum",
) -> Merged:
    """theta_0 + scale * sum_k s_k a_k / sum_k s_k, entry by entry over the flattened model, tensor by tensor.

    a_k = sign(tau_k) * |tau_k| held between its own `clamp` and 1 - `clamp` quantiles, m_k = |a_k| brought to [0, 1];
    - intra-balancing exp(K m_k^2): how large an entry is within its task;
    - inter-balancing tanh(tau_k * sum_j tau_j): whether the tasks agree on it (`agreement="sum"`), or
      tanh(tau_k * sum_j sign(tau_j) m_j) ("normalised"), where no task counts more for having larger weights;
    - s_k: their product, everything below its 1 - `keep` quantile at zero and the rest brought to [0, 1].
    Entries that no task keeps stay the base's. One entry alone in the top share weighs 1 (ours; 0/0 as released).

    Source: Du et al., Parameter Competition Balancing for Model Merging, NeurIPS 2024, in the released form: its
    vision script has `clamp` 0.01, `keep` 0.05, `scale` 1.2 and "normalised", its stand-alone script `clamp` 0.0001,
    `keep` 0.1 and "sum". Both take the unclamped tau_k in the inter-balancing.
    Cost: three passes over the tensors and two samples; beside in- and output a chunk of task vectors and about
    K N / 100 entries to find the quantiles in.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"pcb: keep={keep} must lie in (0, 1]")
    if not 0.0 <= clamp < 0.5:
        raise ValueError(f"pcb: clamp={clamp} must lie in [0, 0.5)")
    if not math.isfinite(scale):
        raise ValueError(f"pcb: scale={scale} must be finite")
    if agreement not in ("sum", "normalised"):
        raise ValueError(f"pcb: agreement={agreement!r} must be one of sum, normalised")

    def stream() -> Merged:
        names = merged_names(base)
        if names:
            balance = _Balance(base, experts, names, keep, clamp, agreement)

            def step(vectors_Kn: Tensor, name: str, start: int) -> Tensor:
                share_Kn = balance.shares(vectors_Kn)
                total_n = share_Kn.sum(0).clamp_min_(1e-12)
                return share_Kn.mul_(balance.clamped(vectors_Kn)).sum(0).div_(total_n).mul_(scale)

            yield from entrywise(base, experts, names, step)
        yield from unmerged(base, experts)

    return stream()


class _Balance:
    """What must be known of the whole model before an entry is weighed: quantiles of magnitudes and of scores."""

    def __init__(
        self,
        base: StateDict,
        experts: Sequence[StateDict],
        names: Sequence[str],
        keep: float,
        clamp: float,
        agreement: Agreement,
    ) -> None:
        self.base, self.experts, self.names, self.agreement = base, experts, names, agreement
        self.size = size = sum(base[name].numel() for name in names)
        low = int(size * clamp)
        high = max(low, int(size * (1 - clamp) - 1))
        ends_R = self._ranked(lambda vectors_Kn: vectors_Kn.abs_().repeat(2, 1), [low, high])
        self.low_K1, self.high_K1 = (ends_K[:, None] for ends_K in ends_R.chunk(2))
        # The released clamp keeps everything above the entry of this rank.
        self.most_K1 = torch.full_like(self.low_K1, -torch.inf)
        self.least_K1 = self._ranked(self._seen_scores, [min(int(size * (1 - keep)), size - 1)])[:, None]

    def clamped(self, vectors_Kn: Float[Tensor, "K n"]) -> Float[Tensor, "K n"]:
        """a_k."""
        return vectors_Kn.sign() * vectors_Kn.abs().clamp_(self.low_K1.to(vectors_Kn), self.high_K1.to(vectors_Kn))

    def scores(self, vectors_Kn: Float[Tensor, "K n"]) -> Float[Tensor, "K n"]:
        """Intra- times inter-balancing."""
        low_K1, high_K1 = self.low_K1.to(vectors_Kn), self.high_K1.to(vectors_Kn)
        m_Kn = _to_unit(vectors_Kn.abs().clamp_(low_K1, high_K1), low_K1, high_K1)
        agreeing_Kn = vectors_Kn if self.agreement == "sum" else vectors_Kn.sign() * m_Kn
        inter_Kn = (vectors_Kn * agreeing_Kn.sum(0)).tanh_()
        return m_Kn.square_().mul_(len(vectors_Kn)).exp_().mul_(inter_Kn)

    def shares(self, vectors_Kn: Float[Tensor, "K n"]) -> Float[Tensor, "K n"]:
        """s_k."""
        least_K1, most_K1 = self.least_K1.to(vectors_Kn), self.most_K1.to(vectors_Kn)
        scores_Kn = self.scores(vectors_Kn)
        alone_Kn = (scores_Kn >= most_K1) & (least_K1 == most_K1) & (scores_Kn > 0)
        return _to_unit(scores_Kn.clamp_min_(least_K1), least_K1, most_K1).masked_fill_(alone_Kn, 1.0)

    def _seen_scores(self, vectors_Kn: Tensor) -> Tensor:
        scores_Kn = self.scores(vectors_Kn)
        torch.maximum(self.most_K1, scores_Kn.amax(1, keepdim=True).to(self.most_K1), out=self.most_K1)
        return scores_Kn

    def _ranked(self, rows: Callable[[Tensor], Tensor], ranks: Sequence[int]) -> Tensor:
        """Of every rank (from 0) all experts' entries, end to end, as `rows` orders them."""

        def found(stride: int) -> Iterator[Tensor]:
            return (rows(vectors_Kn) for _, _, vectors_Kn in chunks(self.base, self.experts, self.names, stride))

        wanted = [rank + 1 for rank in ranks for _ in self.experts]
        return kth_smallest_rows(lambda: found(1), wanted, thinned=(found, self.size))


def _to_unit(values_Kn: Tensor, low_K1: Tensor, high_K1: Tensor) -> Tensor:
    """The values brought from [low, high] to [0, 1], in place; an empty range gives 0."""
    width_K1 = high_K1 - low_K1
    return values_Kn.sub_(low_K1).div_(torch.where(width_K1 > 0, width_K1, torch.ones_like(width_K1)))
