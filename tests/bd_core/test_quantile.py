"""The quantile from added counts is that of the sorted values, to the bit. Shapes: E values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd_core import quantile
from bd_core.discrepancy import positive_quantile
from bd_core.quantile import BUCKETS, histogram, merge, quantile_of_parts, refine

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=40)
@given(st.lists(st.lists(FINITE, max_size=12), min_size=1, max_size=6), st.floats(0, 1), st.integers(1, 9))
def test_parts_have_the_quantile_of_the_whole(parts: list[list[float]], q: float, block: int) -> None:
    tensors = [torch.tensor(part, dtype=torch.float32) for part in parts]
    whole = torch.cat(tensors)
    if not len(whole):
        with pytest.raises(ValueError, match="there are no values"):
            quantile_of_parts(lambda: tensors, q)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantile, "BLOCK", block)
        found = quantile_of_parts(lambda: tensors, q)
    assert found == positive_quantile(whole, q)
    counted = histogram(whole)
    low, high = counted.bounds(q)
    assert low <= found <= high


@settings(max_examples=40)
@given(st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1e-45, 0.1, 0.25, 0.3, 7.0]), min_size=1), st.floats(0, 1))
def test_the_share_below_is_counted_without_the_values(values: list[float], q: float) -> None:
    """What an epsilon makes of all edges: M+ = {d < epsilon}, epsilon compared as float32."""
    whole = torch.tensor(values, dtype=torch.float32)
    counted = histogram(whole)
    refined = refine(whole, counted.buckets(q))
    epsilon = counted.quantile(q, refined)
    assert counted.count_below(epsilon, refined) == int((whole < whole.new_tensor(epsilon)).sum())
    for other in (-2.0, 0.0, 0.26, 8.0):
        bucket = histogram(torch.tensor([other])).buckets(0.0)
        assert counted.count_below(other, refine(whole, bucket)) == int((whole < other).sum())


def test_merging_has_no_order() -> None:
    parts = list(torch.randn(5000, generator=torch.Generator().manual_seed(0)).split([1000, 1, 3999]))
    first, second = merge(histogram(part) for part in parts), merge(histogram(part) for part in parts[::-1])
    assert torch.equal(first.counts, second.counts) and first.total == 5000
    assert first.counts.shape == (BUCKETS,)


def test_values_of_equal_upper_bits() -> None:
    values = (1 + torch.arange(1000, dtype=torch.float32) * 2**-23)[torch.randperm(1000)]
    assert len(histogram(values).counts.nonzero()) == 1
    assert quantile_of_parts(lambda: [values], 0.37) == positive_quantile(values, 0.37)


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0])
def test_one_part_without_values(q: float) -> None:
    parts: list[Tensor] = [torch.tensor([]), torch.tensor([3.0, -4.0])]
    assert quantile_of_parts(lambda: parts, q) == -4 + 7 * q


def test_bounds_are_close() -> None:
    low, high = histogram(torch.rand(100_001, generator=torch.Generator().manual_seed(0))).bounds(0.5)
    assert low <= 0.5 + 0.01 and high >= 0.49 and high / low < 1 + 1 / 64


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match="value 1 is nan"):
        histogram(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match=r"q = 1\.5"):
        histogram(torch.ones(2)).buckets(1.5)
    with pytest.raises(AssertionError, match="not of the same values"):
        histogram(torch.ones(2)).quantile(0.5, refine(torch.ones(1), histogram(torch.ones(1)).buckets(0.0)))
