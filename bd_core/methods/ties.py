"""Ties-Merging: trim, elect sign, disjoint merge.

Legend: K experts, n entries of a chunk, N all merged entries of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.methods.selection import kth_smallest_rows
from bd_core.methods.stream import Merged, StateDict, chunks, entrywise, merged_names, unmerged

__all__ = ["Trim", "Trimmed", "agreeing", "check_keep", "disjoint_merge", "ties"]

Trim = Literal["global", "per_tensor"]


def ties(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    keep: float = 0.2,
    scale: float = 0.3,
    trim: Trim = "global",
    merge: Literal["sum", "mean"] = "sum",
) -> Merged:
    """theta_0 + scale * tau with tau from three steps, entry by entry, tensor by tensor.

    1. Trim: of every tau_k keep the top `keep` share of magnitudes, zero the rest; over the flattened model
       (`trim="global"`, as the paper's code and FusionBench) or in every tensor (`"per_tensor"`, as mergekit). Entries
       as large as the last one kept are kept too.
    2. Elect: the sign of sum_k tau_k. Where the trimmed entries cancel exactly: the sign that most entries of the
       model have (global, as the paper's code), or plus (per_tensor, as mergekit).
    3. Disjoint merge: the sum (`merge="sum"`) or mean (`"mean"`) of the non-zero entries that agree with that sign.

    Source: Yadav et al., TIES-Merging, NeurIPS 2023. `keep` 0.2 is theirs; the released vision code sums, with 0.3.
    Cost: two passes over the tensors and a sample, a third if entries cancel exactly; beside in- and output a chunk of
    task vectors and about K N / 100 entries to find the thresholds in.
    """
    check_keep("ties", keep)
    if not math.isfinite(scale):
        raise ValueError(f"ties: scale={scale} must be finite")
    for name, value, known in (("trim", trim, ("global", "per_tensor")), ("merge", merge, ("sum", "mean"))):
        if value not in known:
            raise ValueError(f"ties: {name}={value!r} must be one of {', '.join(known)}")

    def stream() -> Merged:
        trimmed = Trimmed(base, experts, keep, trim)

        def step(vectors_Kn: Tensor, name: str, start: int) -> Tensor:
            kept_Kn = trimmed.apply(vectors_Kn, name)
            return disjoint_merge(kept_Kn, trimmed, merge).mul_(scale)

        yield from entrywise(base, experts, trimmed.names, step)
        yield from unmerged(base, experts)

    return stream()


class Trimmed:
    """What survives of every task vector: its largest magnitudes, of the whole model or tensor by tensor."""

    def __init__(self, base: StateDict, experts: Sequence[StateDict], keep: float, trim: Trim) -> None:
        self.base, self.experts, self.keep, self.trim = base, experts, keep, trim
        self.names = merged_names(base)
        self._below: dict[tuple[str, torch.dtype], list[float]] = {}

    def apply(self, vectors_Kn: Float[Tensor, "K n"], name: str) -> Float[Tensor, "K n"]:
        """The chunk with everything below its expert's threshold set to zero, in place."""
        # Of all ways to do this the one that makes no boolean tensor is four times as fast: it keeps |x| > bound.
        for row_n, below in zip(vectors_Kn, self._just_below(name, vectors_Kn.dtype), strict=True):
            torch.hardshrink(row_n, below, out=row_n)
        return vectors_Kn

    @cached_property
    def majority_sign(self) -> float:
        """The sign most entries of the summed, trimmed vectors have; plus when trimmed tensor by tensor."""
        if self.trim == "per_tensor":
            return 1.0
        balance = 0.0
        for name, _, vectors_Kn in chunks(self.base, self.experts, self.names):
            balance += float(torch.sign(self.apply(vectors_Kn, name).sum(0)).sum(dtype=torch.float64))
        return -1.0 if balance < 0 else 1.0

    def _just_below(self, name: str, dtype: torch.dtype) -> list[float]:
        """The largest number below each threshold."""
        key = ("" if self.trim == "global" else name, dtype)
        if key not in self._below:
            found_K = self._of_model if self.trim == "global" else self._found([name], at_least=1)
            bound_K = found_K.to(dtype)
            self._below = {key: torch.nextafter(bound_K, torch.full_like(bound_K, -torch.inf)).tolist()}
        return self._below[key]

    @cached_property
    def _of_model(self) -> Tensor:
        return self._found(self.names, at_least=0)

    def _found(self, names: Sequence[str], at_least: int) -> Tensor:
        """The smallest magnitude kept of every expert."""
        size = sum(self.base[name].numel() for name in names)
        kept = max(at_least, int(size * self.keep))

        def magnitudes(stride: int) -> Iterator[Tensor]:
            return (vectors_Kn.abs_() for _, _, vectors_Kn in chunks(self.base, self.experts, names, stride))

        # Global, as the paper's code: the (n - int(keep n))-th smallest magnitude is the last one kept.
        rank = size - kept + (self.trim == "per_tensor")
        if rank < 1 or not names:
            return torch.zeros(len(self.experts))
        return kth_smallest_rows(lambda: magnitudes(1), [rank] * len(self.experts), thinned=(magnitudes, size))


def check_keep(place: str, keep: float) -> None:
    """Nothing; ValueError unless keep is a share in (0, 1]."""
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"{place}: keep={keep} must lie in (0, 1]")


def agreeing(trimmed_Kn: Float[Tensor, "K n"], trimmed: Trimmed) -> Float[Tensor, "K n"]:
    """The entries with the sign of their sum (the majority's where it cancels), the rest at zero, in place."""
    sign_n = _elected(trimmed_Kn, trimmed)
    return _aligned(trimmed_Kn, sign_n).mul_(sign_n)


def disjoint_merge(
    trimmed_Kn: Float[Tensor, "K n"], trimmed: Trimmed, merge: Literal["sum", "mean"]
) -> Float[Tensor, " n"]:
    """The sum or mean of the `agreeing` entries; the chunk is used up."""
    sign_n = _elected(trimmed_Kn, trimmed)
    aligned_Kn = _aligned(trimmed_Kn, sign_n)
    total_n = aligned_Kn.sum(0).mul_(sign_n)
    return total_n if merge == "sum" else total_n.div_(aligned_Kn.sign_().sum(0).clamp_min_(1))


def _elected(trimmed_Kn: Float[Tensor, "K n"], trimmed: Trimmed) -> Float[Tensor, " n"]:
    """The sign of the sum; zero where no expert kept the entry."""
    sign_n = trimmed_Kn.sum(0).sign_()
    cancelled_n = (sign_n == 0).logical_and_(trimmed_Kn.amax(0) > 0)
    if bool(cancelled_n.any()):
        # Asking for it reads all task vectors once more, and through another buffer.
        sign_n[cancelled_n] = trimmed.majority_sign
    return sign_n


def _aligned(trimmed_Kn: Float[Tensor, "K n"], sign_n: Float[Tensor, " n"]) -> Float[Tensor, "K n"]:
    """Magnitudes of the entries that have this sign, the rest at zero, in place."""
    return trimmed_Kn.mul_(sign_n).clamp_min_(0)
