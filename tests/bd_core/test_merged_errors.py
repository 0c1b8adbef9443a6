"""Bad input to the merged model: errors that name the value, the place and the parameter."""

from __future__ import annotations

import merged_cases as cases
import pytest
import torch

from bd_core.merged import MergedModel
from bd_core.task_vectors import TaskVectors, task_vectors


@pytest.fixture
def parts():  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model, inputs = cases.mlp()
    base, experts = cases.experts_of(model, 2)
    return model, inputs, base, experts


@pytest.mark.parametrize("shape", [(5,), (5, 3), (4, 2), (5, 2, 2), (5, 1, 3), (1, 1, 5, 2)])
def test_weights_of_another_shape(parts, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    model, inputs, base, experts = parts
    with pytest.raises((ValueError, TypeError), match="weights"):
        MergedModel(model, base, experts)(inputs, weights=torch.rand(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(parts, value: float) -> None:  # type: ignore[no-untyped-def]
    model, inputs, base, experts = parts
    weights = torch.rand(5, 2)
    weights[3, 1] = value
    with pytest.raises(ValueError, match=r"weights\[3, 1\] is (nan|inf)"):
        MergedModel(model, base, experts)(inputs, weights=weights)


def test_empty_batch(parts) -> None:  # type: ignore[no-untyped-def]
    model, inputs, base, experts = parts
    with pytest.raises(ValueError, match="empty batch"):
        MergedModel(model, base, experts)(inputs[:0], weights=torch.rand(0, 2))


def test_no_positional_input(parts) -> None:  # type: ignore[no-untyped-def]
    model, _, base, experts = parts
    with pytest.raises(ValueError, match="positional"):
        MergedModel(model, base, experts)(weights=torch.rand(5, 2))


def test_inputs_of_unequal_batches(parts) -> None:  # type: ignore[no-untyped-def]
    model, inputs, base, experts = parts
    with pytest.raises(ValueError, match="input 1"):
        MergedModel(model, base, experts)(inputs, inputs[:2], weights=torch.rand(5, 2))


def test_an_expert_that_lacks_a_key(parts) -> None:  # type: ignore[no-untyped-def]
    model, _, base, experts = parts
    del experts[1]["2.weight"]
    with pytest.raises(ValueError, match=r"expert 1: 2\.weight is missing"):
        MergedModel(model, base, experts)


def test_task_vectors_that_lack_a_key(parts) -> None:  # type: ignore[no-untyped-def]
    model, _, base, experts = parts
    vectors = dict(task_vectors(base, experts).vectors)
    del vectors["2.weight"]
    with pytest.raises(ValueError, match=r"lack 2\.weight"):
        MergedModel(model, base, TaskVectors(vectors))


def test_task_vectors_of_another_shape_or_with_nan(parts) -> None:  # type: ignore[no-untyped-def]
    model, _, base, experts = parts
    vectors = dict(task_vectors(base, experts).vectors)
    with pytest.raises(ValueError, match=r"2\.weight"):
        MergedModel(model, base, TaskVectors({**vectors, "2.weight": torch.zeros(2, 3)}))
    with pytest.raises(ValueError, match=r"2\.weight"):
        MergedModel(model, base, TaskVectors({**vectors, "2.weight": torch.full((2, 10), float("nan"))}))


def test_a_base_that_does_not_fit_the_model(parts) -> None:  # type: ignore[no-untyped-def]
    model, _, base, experts = parts
    states = [base, *experts]
    fewer = [{n: t for n, t in s.items() if n != "2.bias"} for s in states]
    with pytest.raises(ValueError, match=r"lacks 2\.bias"):
        MergedModel(model, fewer[0], fewer[1:])
    more = [{**s, "extra": torch.zeros(1)} for s in states]
    with pytest.raises(ValueError, match="extra"):
        MergedModel(model, more[0], more[1:])
    other = [{**s, "2.bias": torch.zeros(9)} for s in states]
    with pytest.raises(ValueError, match=r"2\.bias has shape \[9\] in the base, \[10\] in the model"):
        MergedModel(model, other[0], other[1:])


def test_groups_that_miss_a_name(parts) -> None:  # type: ignore[no-untyped-def]
    model, _, base, experts = parts
    index = dict.fromkeys(base, 0)
    with pytest.raises(ValueError, match=r"2\.bias is -1"):
        MergedModel(model, base, experts, {**index, "2.bias": -1})
    del index["2.bias"]
    with pytest.raises(ValueError, match=r"no layer group for 2\.bias"):
        MergedModel(model, base, experts, index)
