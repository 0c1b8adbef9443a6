"""The exact quantile of float32 values that come in parts, from counts that add up: no sort, no part kept.

Shapes: E values.

Two passes. The first counts each part's values by the upper 16 bits of a float32, in an order that is that of the
numbers; counts of parts are added, in any order, to the same counts. They say in which of the 65536 buckets, all
values within 1/128 of each other, the quantile lies. The second pass counts by the lower 16 bits within that bucket,
which tells every value. A part costs 512 KiB of counts, and a second reading.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from bd_core.checks import check_fraction

__all__ = ["BUCKETS", "Histogram", "histogram", "merge", "quantile_of_parts", "refine"]

BUCKETS = 2**16
BLOCK = 2**22  # values worked on at a time


@dataclass(frozen=True, eq=False)
class Histogram:
    """How many values are in each bucket, lowest values first."""

    counts: Int64[Tensor, " 65536"]

    @cached_property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    def buckets(self, q: float) -> tuple[int, ...]:
        """The one or two buckets that hold the values the quantile lies between, for `refine`.

        Raises ValueError when nothing was counted or q is outside [0, 1].
        """
        first, second, _ = self._ranks(q)
        return tuple(sorted({self._bucket_of_rank(first), self._bucket_of_rank(second)}))

    def bounds(self, q: float) -> tuple[float, float]:
        """Two values the quantile surely lies between, from the first pass alone; at most 1/64 apart, relatively.

        The two may be further apart where they are in different buckets with none between them filled.
        """
        buckets = self.buckets(q)
        return _value(buckets[0], 0), _value(buckets[-1], BUCKETS - 1)

    def quantile(self, q: float, refined: Mapping[int, Int64[Tensor, " 65536"]]) -> float:
        """The value below which a share q lies, linear between two values, as `positive_quantile` has it.

        `refined` has the counts that `refine` made of every part for `buckets(q)`, added up.
        """
        first, second, part = self._ranks(q)
        low, high = self._value_of_rank(first, refined), self._value_of_rank(second, refined)
        return low + part * (high - low)

    def count_below(self, value: float, refined: Mapping[int, Int64[Tensor, " 65536"]]) -> int:
        """How many values are below this one, compared as float32.

        `refined` must have the value's own bucket unless that is empty; `refined` of a quantile does for its value.
        """
        key = int(_keys(torch.tensor([value], dtype=torch.float32)))
        bucket, lower = divmod(key, BUCKETS)
        below = int(self.counts[:bucket].sum())
        return below + int(refined[bucket][:lower].sum()) if self.counts[bucket] else below

    def _ranks(self, q: float) -> tuple[int, int, float]:
        check_fraction(q, "q", "quantile")
        if self.total == 0:
            raise ValueError("quantile: there are no values; lower min_cosine until samples have neighbours")
        low, part = divmod(q * (self.total - 1), 1)
        return int(low), min(int(low) + 1, self.total - 1), part

    def _bucket_of_rank(self, rank: int) -> int:
        return int(torch.searchsorted(self._up_to, rank, right=True))

    @cached_property
    def _up_to(self) -> Tensor:
        return self.counts.cumsum(0)

    def _value_of_rank(self, rank: int, refined: Mapping[int, Tensor]) -> float:
        bucket = self._bucket_of_rank(rank)
        counts = refined[bucket]
        assert int(counts.sum()) == int(self.counts[bucket]), "refined and counts are not of the same values"
        within = rank - (int(self._up_to[bucket - 1]) if bucket else 0)
        return _value(bucket, int(torch.searchsorted(counts.cumsum(0), within, right=True)))


def histogram(values_E: Float32[Tensor, " E"]) -> Histogram:
    """The counts of one part, which may be empty.

    Raises ValueError when a value is not finite.
    """
    counts = torch.zeros(BUCKETS, dtype=torch.int64, device=values_E.device)
    for block in values_E.split(BLOCK):  # type: ignore[no-untyped-call]
        if not torch.isfinite(block).all():
            place = int((~torch.isfinite(values_E)).nonzero()[0])
            raise ValueError(
                f"histogram: value {place} is {values_E[place].item()}; check the alphas the discrepancy was made from"
            )
        counts += torch.bincount(_keys(block) >> 16, minlength=BUCKETS)
    return Histogram(counts)


def merge(histograms: Iterable[Histogram]) -> Histogram:
    """The counts of all parts together."""
    counts = torch.zeros(BUCKETS, dtype=torch.int64)
    for each in histograms:
        counts += each.counts.cpu()
    return Histogram(counts)


def refine(values_E: Float32[Tensor, " E"], buckets: Iterable[int]) -> dict[int, Int64[Tensor, " 65536"]]:
    """Within each of these buckets, how many of a part's values have each of its 65536 numbers, lowest first."""
    refined = {bucket: torch.zeros(BUCKETS, dtype=torch.int64) for bucket in buckets}
    for block in values_E.split(BLOCK):  # type: ignore[no-untyped-call]
        keys = _keys(block)
        for bucket, counts in refined.items():
            lower = keys[keys >> 16 == bucket] & (BUCKETS - 1)
            counts += torch.bincount(lower, minlength=BUCKETS).cpu()
    return refined


def quantile_of_parts(parts: Callable[[], Iterable[Tensor]], q: float) -> float:
    """The exact quantile of all values of all parts, which are gone through twice."""
    whole = merge(histogram(part) for part in parts())
    buckets = whole.buckets(q)
    refined = {bucket: torch.zeros(BUCKETS, dtype=torch.int64) for bucket in buckets}
    for part in parts():
        for bucket, counts in refine(part, buckets).items():
            refined[bucket] += counts
    return whole.quantile(q, refined)


def _keys(values: Tensor) -> Tensor:
    """0 to 2^32 - 1 in the order of the numbers: the bits of a float32, those of negative ones turned round."""
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0: there is one zero
    return torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF)) + 2**31


def _value(bucket: int, lower: int) -> float:
    """The number with this key."""
    key = (bucket << 16 | lower) - 2**31
    bits = key if key >= 0 else (-key) - 2**31
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()
