"""The terms of both stages against loops. Shapes: N samples, C classes, B batch, A anchors, M others, D width."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from bd_core.dirichlet import iec, kl_to_uniform, opinion
from bd_core.losses import (
    discrepancy_contrastive_loss,
    evidential_loss,
    head_loss,
    information_maximisation,
    inverse_loss,
    prediction_entropy,
    unsupervised_loss,
)


def random_alpha(seed: int, n: int = 6, classes: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1 + (torch.randn(n, classes, dtype=dtype, generator=generator) * 2).exp()


def entropy(probability: list[float]) -> float:
    return -sum(p * math.log(p) for p in probability if p > 0)


@given(st.integers(0, 2**32), st.floats(0, 1), st.sampled_from([torch.float32, torch.float64]))
def test_evidential_loss_is_the_definition(seed: int, kl_weight: float, dtype: torch.dtype) -> None:
    alpha = random_alpha(seed, dtype=dtype)
    terms = [
        entropy([value / sum(row) for value in row]) + kl_weight * kl
        for row, kl in zip(alpha.tolist(), kl_to_uniform(alpha).tolist(), strict=True)
    ]
    assert evidential_loss(alpha, kl_weight).item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)
    assert evidential_loss(alpha, kl_weight).dtype == dtype


@given(st.integers(0, 2**32))
def test_inverse_loss_is_the_definition(seed: int) -> None:
    alpha = random_alpha(seed)
    u, nu = opinion(alpha).uncertainty.tolist(), iec(alpha).tolist()
    gated = sum((1 - a) * b / 4 for a, b in zip(u, nu, strict=True)) / 6
    assert inverse_loss(alpha).item() == pytest.approx(gated, rel=1e-9)
    mean_u, mean_nu = sum(u) / 6, sum(nu) / 6
    covariance = sum((a - mean_u) * (b - mean_nu) for a, b in zip(u, nu, strict=True))
    spread = math.sqrt(sum((a - mean_u) ** 2 for a in u) * sum((b - mean_nu) ** 2 for b in nu))
    assert inverse_loss(alpha, "pearson").item() == pytest.approx(covariance / spread, rel=1e-6)
    assert -1 - 1e-9 <= inverse_loss(alpha, "pearson").item() <= 1 + 1e-9
    assert 0 <= inverse_loss(alpha).item() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pearson_of_a_constant_batch_is_zero_with_a_finite_gradient(dtype: torch.dtype) -> None:
    for n in (1, 5):
        alpha = torch.full((n, 3), 2.0, dtype=dtype, requires_grad=True)
        loss = inverse_loss(alpha, "pearson")
        loss.backward()
        assert loss.item() == 0
        assert torch.isfinite(alpha.grad).all()  # type: ignore[arg-type]


def test_confident_and_ambiguous_is_what_the_gate_punishes() -> None:
    unsure, sure = torch.ones(1, 3), torch.tensor([[90.0, 1, 1]])
    torn = torch.tensor([[2.0, 2, 1]])
    assert inverse_loss(unsure).item() == 0
    assert inverse_loss(sure) < inverse_loss(torn)


@given(st.integers(0, 2**32), st.sampled_from(["gated", "pearson"]))
def test_head_loss_is_the_weighted_sum(seed: int, form: str) -> None:
    alpha = random_alpha(seed)
    expected = evidential_loss(alpha, 0.3) + 0.7 * inverse_loss(alpha, form)  # type: ignore[arg-type]
    torch.testing.assert_close(head_loss(alpha, 0.3, 0.7, form), expected)  # type: ignore[arg-type]
    torch.testing.assert_close(head_loss(alpha), evidential_loss(alpha, 0.1) + 0.1 * inverse_loss(alpha, "gated"))


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 6), st.floats(0, 300))
def test_entropies_are_the_definition(seed: int, n: int, classes: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, dtype=torch.float64, generator=generator) * scale
    rows = []
    for row in logits.tolist():
        exponentials = [math.exp(value - max(row)) for value in row]
        rows.append([value / sum(exponentials) for value in exponentials])
    expected = [entropy(row) for row in rows]
    assert prediction_entropy(logits).tolist() == pytest.approx(expected, abs=1e-9)
    assert unsupervised_loss(logits).item() == pytest.approx(sum(expected) / n, abs=1e-9)
    mean = [sum(row[c] for row in rows) / n for c in range(classes)]
    assert information_maximisation(logits).item() == pytest.approx(-entropy(mean), abs=1e-9)


def test_information_maximisation_is_least_for_spread_predictions() -> None:
    spread, collapsed = torch.eye(4) * 50, torch.eye(4)[:1].repeat(4, 1) * 50
    assert information_maximisation(spread).item() == pytest.approx(-math.log(4), rel=1e-4)
    assert information_maximisation(collapsed).item() == pytest.approx(0, abs=1e-4)
    assert unsupervised_loss(spread) == unsupervised_loss(collapsed)


@st.composite
def contrasts(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """anchors [A, D], others [A, M, D] with nan in the padding, positive [A, M], valid [A, M]."""
    anchors, others, width = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    anchor = normalize(torch.randn(anchors, width, dtype=torch.float64, generator=generator), dim=1)
    other = normalize(torch.randn(anchors, others, width, dtype=torch.float64, generator=generator), dim=2)
    valid = torch.rand(anchors, others, generator=generator) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    positive = valid & (torch.rand(anchors, others, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0])))
    other[~valid] = torch.nan
    return anchor, other, positive, valid


@given(contrasts(), st.floats(0.02, 2))
def test_contrastive_loss_is_multi_positive_infonce(
    case: tuple[Tensor, Tensor, Tensor, Tensor], temperature: float
) -> None:
    anchor, other, positive, valid = case
    anchor.requires_grad_()
    other.requires_grad_()
    loss, n_used = discrepancy_contrastive_loss(*case, temperature=temperature)
    terms = []
    for i in range(len(anchor)):
        similarity = {
            m: float((anchor[i] @ other[i, m]).detach()) / temperature for m in range(other.shape[1]) if valid[i, m]
        }
        own = [m for m in similarity if positive[i, m]]
        if own:
            total = sum(math.exp(value) for value in similarity.values())
            terms.append(sum(-math.log(math.exp(similarity[m]) / total) for m in own) / len(own))
    assert n_used == len(terms)
    assert loss.item() == pytest.approx(sum(terms) / max(1, len(terms)), abs=1e-9)
    assert loss.item() >= -1e-12
    loss.backward()
    assert torch.isfinite(anchor.grad).all()  # type: ignore[arg-type]
    assert other.grad is None or torch.isfinite(other.grad).all()


def test_contrastive_loss_pulls_positives_and_pushes_negatives() -> None:
    anchor, near, far = torch.tensor([[1.0, 0]]), torch.tensor([0.8, 0.6]), torch.tensor([0.6, -0.8])
    other = torch.stack([near, far])[None]
    valid = torch.ones(1, 2, dtype=torch.bool)
    right, wrong = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    assert discrepancy_contrastive_loss(anchor, other, right, valid)[0] < 0.2
    assert discrepancy_contrastive_loss(anchor, other, wrong, valid)[0] > 2


def test_anchors_may_be_reordered() -> None:
    generator = torch.Generator().manual_seed(0)
    anchor = normalize(torch.randn(4, 3, generator=generator), dim=1)
    other = normalize(torch.randn(4, 5, 3, generator=generator), dim=2)
    positive = torch.rand(4, 5, generator=generator) < 0.5
    valid, order = torch.ones_like(positive), torch.tensor([2, 0, 3, 1])
    first = discrepancy_contrastive_loss(anchor, other, positive, valid)
    second = discrepancy_contrastive_loss(anchor[order], other[order], positive[order], valid)
    torch.testing.assert_close(first, second)


def test_bad_input_is_named() -> None:
    logits = torch.zeros(2, 3)
    logits[1, 0] = torch.nan
    for function in (prediction_entropy, unsupervised_loss, information_maximisation):
        with pytest.raises(ValueError, match=r"logits\[1, 0\] = nan"):
            function(logits)
        with pytest.raises(ValueError, match=r"logits have shape \(0, 3\)"):
            function(logits[:0])
    with pytest.raises(ValueError, match=r"alpha\[0, 0\] = 0.0"):
        head_loss(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="form = 'ratio' is unknown"):
        inspect.unwrap(inverse_loss)(torch.ones(2, 3), "ratio")

    anchor, other = torch.eye(2), torch.eye(2).repeat(2, 1, 1)
    yes, no = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)
    for arguments, message in (
        ((anchor * 2, other, yes, yes), "anchors: row 0 has a length other than 1"),
        ((anchor, other * 2, yes, yes), "valid others: row 0 has a length"),
        ((anchor, other * torch.nan, yes, yes), "valid others: row 0 has nan or inf"),
        ((anchor, other, yes, no), r"positive\[0, 0\] is padding"),
        ((anchor, other, yes, yes, 0.0), "temperature = 0.0"),
        ((anchor[:0], other[:0], yes[:0], yes[:0]), r"features have shape \(0, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            discrepancy_contrastive_loss(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs \[A, D\], \[A, M, D\]"):
        inspect.unwrap(discrepancy_contrastive_loss)(anchor, other, yes[:1], yes)
