"""Exact forms and their choice: the same result whichever runs, and no more working memory than was granted."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merged_cases import Case, conv_net, experts_of, mlp, odd, open_clip_vit, token_mlp
from torch import Tensor, nn

from bd_core.merged import MergedModel, exact
from bd_core.merged.cost import CPU, Call, Costs, stacked_is_cheaper
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


@given(
    samples=st.integers(1, 300),
    tokens=st.integers(3, 300),
    experts=st.integers(2, 40),
    outputs=st.integers(1, 4096),
    inputs=st.integers(1, 4096),
)
def test_stacking_is_for_one_or_two_tokens(samples: int, tokens: int, experts: int, outputs: int, inputs: int) -> None:
    assert not stacked_is_cheaper(Call(samples, tokens, experts, outputs, inputs), CPU)


def test_the_form_follows_tokens_experts_shape_and_batch() -> None:
    tower = Call(n_samples=64, n_tokens=1, n_experts=8, n_outputs=512, n_inputs=768)
    assert stacked_is_cheaper(tower, CPU), "one token of many samples does not pay for a matrix a sample"
    assert not stacked_is_cheaper(replace(tower, n_tokens=50), CPU)
    assert not stacked_is_cheaper(replace(tower, n_samples=1), CPU), "both read every matrix once; tiles take one call"
    assert not stacked_is_cheaper(replace(tower, n_outputs=8, n_inputs=8), CPU), "small matrices: the calls decide"
    assert not stacked_is_cheaper(replace(tower, n_inputs=1), CPU), "what is written weighs more than the products"
    free = Costs(form=1.0, multiply=1.0, stacked=1.0, read=0.0, call_tiles=0.0, call_stacked=0.0)
    for experts in (1, 2, 8):  # (1 + K) T < K + T exactly where T < 1 + 1 / K
        assert not stacked_is_cheaper(replace(tower, n_tokens=2, n_experts=experts), free)


def test_a_sample_is_the_same_in_batches_that_take_different_forms() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((64, 1, 768), (64, 8), (512, 768), (8, 512, 768), (64, 512))
    x, w, base, vectors, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    w = torch.softmax(w, -1)
    calls = [Call(n_samples, 1, 8, 512, 768) for n_samples in (1, 64)]
    assert [stacked_is_cheaper(call, CPU) for call in calls] == [False, True]
    together = merged_linear(x, w, base, vectors, bias)
    alone = torch.cat([merged_linear(x[b : b + 1], w[b : b + 1], base, vectors, bias[b : b + 1]) for b in range(8)])
    assert float((alone - together[:8]).norm() / together[:8].norm()) <= 1e-6


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
    assert [m.bytes_per_expert for m in (held, exact_)] == [size // 3 for size in sizes]
    shared = MergedModel(model, base, experts, mode="grouped", vectors_dtype=torch.bfloat16)
    equal = weights[:1].detach().expand(4 * len(inputs), -1)
    with torch.no_grad():
        x = inputs.repeat(4, *(1,) * (inputs.ndim - 1))
        torch.testing.assert_close(shared(x, weights=equal), exact_(x, weights=equal), rtol=1e-4, atol=1e-4)


def test_task_vectors_in_whole_numbers_are_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"vectors_dtype is torch\.int8, needs a floating-point dtype"):
        MergedModel(model, *experts_of(model, 2), vectors_dtype=torch.int8)
