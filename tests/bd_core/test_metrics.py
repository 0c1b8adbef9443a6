"""Metrics against scikit-learn where it has them, and against loops. Shapes: N samples."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, roc_auc_score
from torch import Tensor

from bd_core.metrics import (
    accuracy,
    area_under_risk_coverage,
    auroc,
    expected_calibration_error,
    relative_drop,
    reliability_bins,
)


@st.composite
def judged(draw: st.DrawFn, max_size: int = 40) -> tuple[Tensor, Tensor]:
    """Confidences [N] with ties and both ends of [0, 1], and whether each was right."""
    n = draw(st.integers(1, max_size))
    value = st.one_of(st.sampled_from([0.0, 0.2, 0.6, 1.0]), st.floats(0, 1, width=32))
    confidence = torch.tensor(
        draw(st.lists(value, min_size=n, max_size=n)), dtype=draw(st.sampled_from([torch.float32, torch.float64]))
    )
    return confidence, torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_accuracy_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predictions, labels = torch.tensor(pairs).unbind(1)
    assert accuracy(predictions, labels) == pytest.approx(accuracy_score(labels.numpy(), predictions.numpy()))


def test_relative_drop() -> None:
    assert relative_drop(0.8, 0.6) == pytest.approx(0.25)
    assert relative_drop(0.5, 0.5) == 0
    assert relative_drop(0.5, 0.6) < 0
    with pytest.raises(ValueError, match=r"clean = 0\.0"):
        relative_drop(0.0, 0.1)


@given(judged(), st.integers(1, 20))
def test_bins_and_ece_are_the_definition(case: tuple[Tensor, Tensor], bins: int) -> None:
    confidence, correct = case
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for value, right in zip(confidence.tolist(), correct.tolist(), strict=True):
        home = next((b for b in range(bins) if value * bins <= b + 1), bins - 1)
        members[home].append((value, right))
    table, error = reliability_bins(confidence, correct, bins), 0.0
    for b, inside in enumerate(members):
        assert table.count[b].item() == len(inside)
        if not inside:
            assert math.isnan(table.confidence[b]) and math.isnan(table.accuracy[b])
            continue
        mean_confidence, share = (sum(column) / len(inside) for column in zip(*inside, strict=True))
        assert table.confidence[b].item() == pytest.approx(mean_confidence)
        assert table.accuracy[b].item() == pytest.approx(share)
        error += len(inside) / len(confidence) * abs(share - mean_confidence)
    assert expected_calibration_error(confidence, correct, bins) == pytest.approx(error)


def test_ece_of_the_calibrated_and_of_the_always_wrong() -> None:
    assert expected_calibration_error(torch.full((4,), 0.75), torch.tensor([True, True, True, False])) == 0
    assert expected_calibration_error(torch.ones(4), torch.zeros(4, dtype=torch.bool)) == 1


@given(judged(max_size=6))
def test_aurc_is_the_mean_over_all_orders_of_ties(case: tuple[Tensor, Tensor]) -> None:
    confidence, correct = (part.tolist() for part in case)
    areas = []
    for order in itertools.permutations(range(len(confidence))):
        if any(confidence[a] < confidence[b] for a, b in itertools.pairwise(order)):
            continue
        risks = [sum(not correct[i] for i in order[:k]) / k for k in range(1, len(order) + 1)]
        areas.append(sum(risks) / len(risks))
    assert area_under_risk_coverage(*case) == pytest.approx(sum(areas) / len(areas))


@given(judged(), st.integers(0, 2**32))
def test_sample_order_does_not_matter(case: tuple[Tensor, Tensor], seed: int) -> None:
    confidence, correct = case
    order = torch.randperm(len(correct), generator=torch.Generator().manual_seed(seed))
    for metric in (area_under_risk_coverage, expected_calibration_error):
        assert metric(confidence[order], correct[order]) == pytest.approx(metric(confidence, correct))


def test_aurc_rewards_a_right_order() -> None:
    confidence = torch.tensor([0.9, 0.8, 0.7, 0.1])
    assert area_under_risk_coverage(confidence, torch.tensor([True, True, True, False])) == 1 / 16
    assert area_under_risk_coverage(confidence, torch.tensor([False, True, True, True])) > 0.5


@given(judged())
def test_auroc_is_that_of_scikit_learn(case: tuple[Tensor, Tensor]) -> None:
    scores, positive = case
    assume(positive.any() and not positive.all())
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive.numpy(), scores.numpy()))
    assert auroc(-scores, positive) == pytest.approx(1 - auroc(scores, positive))
    assert auroc(scores, ~positive) == pytest.approx(1 - auroc(scores, positive))


def test_auroc_by_pairs() -> None:
    assert auroc(torch.tensor([3, 1, 2, 2]), torch.tensor([True, False, True, False])) == 3.5 / 4
    assert auroc(torch.zeros(5), torch.tensor([True, False, True, False, False])) == 0.5


def test_bad_input_is_named() -> None:
    yes = torch.ones(2, dtype=torch.bool)
    empty = torch.ones(0)
    for call, message in (
        (lambda: accuracy(empty, empty), r"accuracy: shapes are \(0,\) and \(0,\)"),
        (lambda: auroc(torch.ones(2), yes), "2 positives, 0 negatives"),
        (lambda: auroc(torch.tensor([1.0, math.nan]), yes), "auroc: value 1 is nan; leave out samples without one"),
        (lambda: reliability_bins(torch.ones(2), yes, 0), "bins = 0"),
        (lambda: expected_calibration_error(torch.tensor([0.5, 1.5]), yes), r"in \[0.5, 1.5\], needs \[0, 1\]"),
        (lambda: area_under_risk_coverage(torch.tensor([-0.5, 1.0]), yes), "probabilities, not logits"),
        (lambda: area_under_risk_coverage(torch.tensor([0.5, math.inf]), yes), "value 1 is inf"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
