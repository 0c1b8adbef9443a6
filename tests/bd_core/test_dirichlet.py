"""Opinion, IEC and KL against their definitions. Shapes: N samples, C classes."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from bd_core.dirichlet import iec, kl_to_uniform, opinion


@st.composite
def alphas(draw: st.DrawFn, min_classes: int = 2) -> Tensor:
    """alpha between nearly uniform and very sharp, float32 or float64."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    shape = draw(st.integers(1, 5)), draw(st.integers(min_classes, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.0, 0.1, 1.0, 5.0]))
    return 1 + (torch.randn(shape, generator=generator, dtype=dtype) * spread).exp() * draw(
        st.sampled_from([0.0, 1, 30])
    )


@given(alphas())
def test_opinion_is_the_definition(alpha: Tensor) -> None:
    found = opinion(alpha)
    for i, row in enumerate(alpha.tolist()):
        strength = sum(row)
        assert found.uncertainty[i].item() == pytest.approx(len(row) / strength, rel=1e-5)
        for c, value in enumerate(row):
            assert found.belief[i, c].item() == pytest.approx((value - 1) / strength, rel=1e-5, abs=1e-6)
            assert found.probability[i, c].item() == pytest.approx(value / strength, rel=1e-5)


@given(alphas())
def test_belief_and_uncertainty_share_one(alpha: Tensor) -> None:
    found = opinion(alpha)
    one = torch.ones_like(found.uncertainty)
    torch.testing.assert_close(found.belief.sum(1) + found.uncertainty, one)
    torch.testing.assert_close(found.probability.sum(1), one)
    assert found.belief.min() >= 0
    assert found.belief.dtype == found.uncertainty.dtype == found.probability.dtype == alpha.dtype


@given(alphas())
def test_iec_is_the_printed_product(alpha: Tensor) -> None:
    for found, row in zip(iec(alpha).tolist(), alpha.tolist(), strict=True):
        first, second, strength, classes = *sorted(row, reverse=True)[:2], sum(row), len(row)
        assert found == pytest.approx((strength / first) * (classes / strength) * (second / first), rel=1e-5)
        assert found == pytest.approx(classes * second / first**2, rel=1e-5)


def test_iec_goes_from_the_number_of_classes_to_zero() -> None:
    assert iec(torch.ones(1, 7)).item() == 7
    confident = torch.ones(1, 7)
    confident[0, 3] = 1e30  # its square is inf in float32
    assert 0 <= iec(confident).item() < 1e-29 * 7


@given(alphas(), st.randoms(use_true_random=False))
def test_classes_and_samples_may_be_reordered(alpha: Tensor, random: "random.Random") -> None:
    classes, rows = list(range(alpha.shape[1])), list(range(alpha.shape[0]))
    random.shuffle(classes)
    random.shuffle(rows)
    mixed = alpha[rows][:, classes]
    torch.testing.assert_close(opinion(mixed).belief, opinion(alpha).belief[rows][:, classes])
    torch.testing.assert_close(iec(mixed), iec(alpha)[rows])
    torch.testing.assert_close(kl_to_uniform(mixed), kl_to_uniform(alpha)[rows])


@given(alphas())
def test_kl_to_uniform_is_the_divergence_of_torch(alpha: Tensor) -> None:
    wide = alpha.double()
    expected = kl_divergence(Dirichlet(wide), Dirichlet(torch.ones_like(wide)))
    torch.testing.assert_close(kl_to_uniform(alpha).double(), expected, rtol=1e-5, atol=1e-6)
    assert kl_to_uniform(alpha).dtype == alpha.dtype
    assert kl_to_uniform(alpha).min() >= 0


def test_kl_to_uniform_is_the_definition() -> None:
    for row in ([1.0, 2.0, 5.5], [0.3, 0.9], [40.0, 1.0, 1.0, 1.0]):
        strength = sum(row)
        digamma = [torch.digamma(torch.tensor(value, dtype=torch.float64)).item() for value in [*row, strength]]
        expected = math.lgamma(strength) - math.lgamma(len(row)) - sum(math.lgamma(value) for value in row)
        expected += sum((value - 1) * (psi - digamma[-1]) for value, psi in zip(row, digamma[:-1], strict=True))
        assert kl_to_uniform(torch.tensor([row])).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("classes", [1, 2, 10, 758])
def test_kl_to_uniform_is_zero_only_at_one(classes: int) -> None:
    assert kl_to_uniform(torch.ones(1, classes)).item() == 0
    if classes > 1:
        assert kl_to_uniform(torch.full((1, classes), 1.1)).item() > 0


def test_kl_to_uniform_survives_huge_evidence_in_float32() -> None:
    # For two classes with alpha = a each the Dirichlet tends to a normal of variance 1 / (8 a):
    # KL = -entropy = -ln(2 pi e / (8 a)) / 2.
    for a in (1e4, 1e6, 1e8):
        expected = -0.5 * math.log(2 * math.pi * math.e / (8 * a))
        assert kl_to_uniform(torch.full((1, 2), a)).item() == pytest.approx(expected, rel=1e-4)


def test_gradients_are_right() -> None:
    alpha = (1 + torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    assert torch.autograd.gradcheck(kl_to_uniform, alpha)
    assert torch.autograd.gradcheck(iec, alpha)


@pytest.mark.parametrize("function", [opinion, iec, kl_to_uniform])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_bad_alpha_is_named(function: object, value: float) -> None:
    alpha = torch.ones(3, 4)
    alpha[1, 2] = value
    with pytest.raises(ValueError, match=rf"alpha\[1, 2\] = {value}.*use alpha = evidence \+ 1"):
        function(alpha)  # type: ignore[operator]


def test_empty_or_misshaped_alpha_is_refused() -> None:
    with pytest.raises(ValueError, match=r"opinion: alpha has shape \(0, 3\)"):
        opinion(torch.ones(0, 3))
    with pytest.raises(ValueError, match=r"iec: alpha has shape \(2, 1\), needs \[N >= 1, C >= 2\]"):
        iec(torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"opinion: alpha has shape \(3,\)"):
        inspect.unwrap(opinion)(torch.ones(3))  # unwrapped: the suite's shape checks would answer first
