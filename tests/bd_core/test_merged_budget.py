"""Exact forms and their choice: the same result whichever runs, and no more working memory than was granted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merged_cases import Case, conv_net, experts_of, mlp, odd, open_clip_vit, token_mlp
from torch import Tensor, nn

from bd_core.merged import MergedModel, exact
from bd_core.merged.cost import CPU, CUDA, Costs, stacked_is_cheaper
from bd_core.merged.exact import merged_linear
from bd_core.task_vectors import TaskVectors, task_vectors


def definition(x: Tensor, w: Tensor, base: Tensor, vectors: Tensor, bias: Tensor) -> Tensor:
    merged = base + torch.einsum("bk,koi->boi", w, vectors)
    return torch.einsum("bti,boi->bto", x, merged) + bias[:, None]


def operands(n_samples: int, n_tokens: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n_samples * 100 + n_tokens)
    shapes = ((n_samples, n_tokens, 6), (n_samples, 3), (5, 6), (3, 5, 6), (n_samples, 5))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("cheaper", [True, False])
@pytest.mark.parametrize("budget", [1, 3 * 5 * 8 * 4, 2 * 3 * 5 * 8 * 4, 1 << 20])
def test_both_forms_are_the_definition_within_any_budget(
    cheaper: bool, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "stacked_is_cheaper", lambda *_: cheaper)
    given_ = operands(5, 4)
    leaves = [each.clone().requires_grad_(place in (0, 1, 4)) for place, each in enumerate(given_)]
    x, w, base, vectors, bias = leaves
    found = merged_linear(x, w, base, vectors, bias, budget_bytes=budget)
    expected = definition(x, w, base, vectors, bias)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad((y**2).sum(), [x, w, bias]) for y in (found, expected))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_stacked_products_never_outgrow_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "stacked_is_cheaper", lambda *_: True)
    seen: list[int] = []
    product = torch.matmul

    def watched(x: Tensor, other: Tensor) -> Tensor:
        result = product(x, other)
        seen.append(result.numel() * result.element_size())
        return result

    monkeypatch.setattr(torch, "matmul", watched)
    a_sample = 4 * 3 * 5 * 8
    x, w, base, vectors, bias = operands(7, 4)
    merged_linear(x, w, base, vectors, bias, budget_bytes=2 * a_sample)
    assert seen == [2 * a_sample] * 3 + [a_sample]


@given(tokens=st.integers(1, 300), experts=st.integers(1, 40))
def test_stacking_is_for_few_tokens(tokens: int, experts: int) -> None:
    for costs in (CPU, CUDA, Costs(form=1.0, multiply=1.0, stacked=1.0)):
        if not stacked_is_cheaper(tokens, experts, costs):
            assert not stacked_is_cheaper(tokens + 1, experts, costs)
    assert stacked_is_cheaper(1, experts, CPU), "one token a sample never pays for a matrix of its own"
    assert not stacked_is_cheaper(50, experts, CPU)


def test_groups_of_a_small_budget_are_those_of_a_large_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 4))
    base, experts = experts_of(model, 3)
    weights = torch.softmax(torch.randn(3, 3), -1).repeat(8, 1)
    x = torch.randn(24, 6)
    found = []
    with torch.no_grad():
        for budget in (1, 7 * 6 * 4, 1 << 20):
            grouped = MergedModel(model, base, experts, mode="grouped", budget_bytes=budget)
            found.append(grouped(x, weights=weights))
    expected = MergedModel(model, base, experts)(x, weights=weights)
    for each in found:
        torch.testing.assert_close(each, expected)


def test_a_budget_of_nothing_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="budget_bytes is 0, needs at least 1"):
        MergedModel(model, *experts_of(model, 2), budget_bytes=0)


@pytest.mark.parametrize("case", [mlp, token_mlp, conv_net, open_clip_vit, odd], ids=lambda case: case.__name__)
def test_task_vectors_held_in_bfloat16_are_those_rounded_once(case: Case) -> None:
    torch.manual_seed(0)
    model, inputs = case()
    base, experts = experts_of(model, 3)
    held = MergedModel(model, base, experts, vectors_dtype=torch.bfloat16)
    rounded = task_vectors(base, experts)
    rounded = TaskVectors(
        {name: v.bfloat16().to(v.dtype) if v.ndim > 2 else v for name, v in rounded.vectors.items()}, rounded.constants
    )
    exact_ = MergedModel(model, base, rounded)
    found = []
    for merged in (held, exact_):
        weights = torch.softmax(torch.linspace(0, 1, 3 * len(inputs)).view(-1, 3), -1).requires_grad_()
        y = merged(inputs, weights=weights)
        found.append((y, *torch.autograd.grad(y.square().sum(), weights)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max()))
    sizes = [
        sum(b.numel() * b.element_size() for name, b in m.named_buffers() if name.endswith("vectors"))
        for m in (held, exact_)
    ]
    assert sizes[0] < 0.8 * sizes[1]  # biases are a large part of models this small


def test_task_vectors_in_whole_numbers_are_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"vectors_dtype is torch\.int8, needs a floating-point dtype"):
        MergedModel(model, *experts_of(model, 2), vectors_dtype=torch.int8)
