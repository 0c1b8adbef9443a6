"""The merged model against its definition: every sample through explicitly merged parameters."""

from __future__ import annotations

import copy
import itertools

import merged_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bd_core.compression import svd_compress
from bd_core.merged import MergedModel
from bd_core.task_vectors import layer_groups, task_vectors


def built(case: cases.Case, n_experts: int = 3, grouped: bool = True):  # type: ignore[no-untyped-def]
    torch.manual_seed(7)
    model, inputs = case()
    base, experts = cases.experts_of(model, n_experts)
    groups = layer_groups(base)
    index = groups.index if grouped else dict.fromkeys(base, 0)
    merged = MergedModel(model, base, experts, groups if grouped else None)
    weights = torch.softmax(torch.randn(len(inputs), merged.n_groups, n_experts), -1)
    return model, inputs, base, experts, index, merged, weights


def tensors(output: object) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [part for part in output]  # type: ignore[attr-defined]


@pytest.mark.parametrize("grouped", [False, True], ids=["one_group", "layer_groups"])
@pytest.mark.parametrize("case", [*cases.NATIVE, *cases.THROUGH_VMAP], ids=lambda case: case.__name__)
def test_output_and_gradients_equal_explicit_merging(case: cases.Case, grouped: bool) -> None:
    model, inputs, base, experts, index, merged, weights = built(case, grouped=grouped)
    vectors = task_vectors(base, experts)
    leaves: list[tuple[Tensor, Tensor]] = []
    outputs = []
    for forward in (
        lambda x, w: merged(x, weights=w),
        lambda x, w: cases.reference(model, base, vectors, x, w, index),
    ):
        x = inputs.clone().requires_grad_(inputs.is_floating_point())
        w = weights.clone().requires_grad_()
        found = tensors(forward(x, w))
        probes = [torch.linspace(-1, 1, part.numel()).view_as(part) for part in found]
        sum((part * probe).sum() for part, probe in zip(found, probes, strict=True)).backward()
        outputs.append(found)
        leaves.append((x, w))
    for found, wanted in zip(*outputs, strict=True):
        assert cases.relative_error(found, wanted) <= 1e-5
    (x, w), (x_ref, w_ref) = leaves
    assert cases.relative_error(w.grad, w_ref.grad) <= 1e-5
    if inputs.is_floating_point():
        assert cases.relative_error(x.grad, x_ref.grad) <= 1e-5


@pytest.mark.parametrize("case", cases.NATIVE, ids=lambda case: case.__name__)
def test_native_models_need_no_fallback(case: cases.Case) -> None:
    _, inputs, _, _, _, merged, weights = built(case)
    merged(inputs, weights=weights)
    assert merged.fallback_reason is None


@pytest.mark.parametrize("case", cases.THROUGH_VMAP, ids=lambda case: case.__name__)
def test_other_models_say_why_they_fall_back(case: cases.Case) -> None:
    _, inputs, _, _, _, merged, weights = built(case)
    merged(inputs, weights=weights)
    assert merged.fallback_reason


@pytest.mark.parametrize("case", [*cases.NATIVE, *cases.THROUGH_VMAP], ids=lambda case: case.__name__)
def test_a_sample_does_not_depend_on_its_batch(case: cases.Case) -> None:
    _, inputs, _, _, _, merged, weights = built(case)
    together = tensors(merged(inputs, weights=weights))
    for b in range(len(inputs)):
        alone = tensors(merged(inputs[b : b + 1], weights=weights[b : b + 1]))
        for one, many in zip(alone, together, strict=True):
            assert cases.relative_error(one[0], many[b]) <= 1e-6


@pytest.mark.parametrize("case", [*cases.NATIVE, *cases.THROUGH_VMAP], ids=lambda case: case.__name__)
def test_one_hot_weights_give_the_expert_and_zero_weights_the_base(case: cases.Case) -> None:
    model, inputs, base, experts, _, merged, weights = built(case)
    for k, state in [*enumerate(experts), (None, base)]:
        w = torch.zeros_like(weights)
        if k is not None:
            w[:, :, k] = 1
        alone = copy.deepcopy(model).eval()
        alone.load_state_dict(state)
        for found, wanted in zip(tensors(merged(inputs, weights=w)), tensors(alone(inputs)), strict=True):
            assert cases.relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize("case", cases.NATIVE, ids=lambda case: case.__name__)
def test_permuting_experts_with_their_weights_changes_nothing(case: cases.Case) -> None:
    model, inputs, base, experts, _, merged, weights = built(case, grouped=False)
    order = [2, 0, 1]
    permuted = MergedModel(model, base, [experts[k] for k in order])
    outputs = permuted(inputs, weights=weights[:, :, order]), merged(inputs, weights=weights)
    for found, wanted in zip(*map(tensors, outputs), strict=True):
        assert cases.relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize("case", [*cases.NATIVE, *cases.THROUGH_VMAP], ids=lambda case: case.__name__)
def test_the_model_passed_in_is_never_modified(case: cases.Case) -> None:
    torch.manual_seed(7)
    model, inputs = case()
    base, experts = cases.experts_of(model, 2)
    model.train()
    before = copy.deepcopy(model)
    kinds = [type(part) for part in model.modules()]
    merged = MergedModel(model, base, experts)
    merged(inputs, weights=torch.full((len(inputs), 2), 0.5))
    merged.double()
    assert [type(part) for part in model.modules()] == kinds
    assert all(part.training for part in model.modules())
    for (name, tensor), other in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name


def test_it_has_no_parameters_an_empty_state_and_stays_in_evaluation() -> None:
    *_, merged, _ = built(cases.open_clip_vit)
    assert list(merged.parameters()) == []
    assert merged.state_dict() == {}
    assert not any(part.training for part in merged.train().modules())


@pytest.mark.parametrize("case", [cases.open_clip_vit, cases.odd], ids=lambda case: case.__name__)
def test_moving_and_casting_reach_every_tensor(case: cases.Case) -> None:
    model, inputs, base, experts, index, merged, weights = built(case)
    found = merged.double()(inputs.double(), weights=weights)
    base, *experts = ({name: tensor.double() for name, tensor in state.items()} for state in (base, *experts))
    wanted = cases.reference(model, base, task_vectors(base, experts), inputs.double(), weights, index)
    assert found.dtype == torch.float64
    assert cases.relative_error(found, wanted) <= 1e-6  # the float32 task vectors were rounded once


def test_dropout_and_batch_statistics_are_off() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9), nn.BatchNorm1d(4)).train()
    base, experts = cases.experts_of(model, 2)
    merged = MergedModel(model, base, experts).train()
    x, w = torch.randn(3, 4), torch.rand(3, 2)
    assert torch.equal(merged(x, weights=w), merged(x, weights=w))
    assert merged.fallback_reason is None


def test_weights_without_groups_hold_for_every_group() -> None:
    _, inputs, _, _, _, merged, weights = built(cases.open_clip_vit)
    shared = weights[:, :1]
    assert merged.n_groups > 1
    wanted = merged(inputs, weights=shared.expand_as(weights).contiguous())
    assert torch.equal(merged(inputs, weights=shared[:, 0]), wanted)
    assert torch.equal(merged(inputs, weights=shared), wanted)


def test_compressed_vectors_run_like_their_expansion() -> None:
    model, inputs, base, experts, _, _, weights = built(cases.mlp, grouped=False)
    compressed = svd_compress(task_vectors(base, experts), rank=2)
    found = MergedModel(model, base, compressed)(inputs, weights=weights)
    wanted = MergedModel(model, base, compressed.expanded())(inputs, weights=weights)
    assert cases.relative_error(found, wanted) <= 1e-5
    assert torch.equal(MergedModel(model, base, compressed, mode="exact")(inputs, weights=weights), wanted)


def test_one_expert_equal_to_the_base_is_the_base() -> None:
    model, inputs = cases.mlp()
    base = dict(model.state_dict())
    merged = MergedModel(model, base, [base])
    assert cases.relative_error(merged(inputs, weights=torch.full((5, 1), 7.0)), model(inputs)) <= 1e-6


def test_nothing_of_size_batch_times_parameters_is_kept_for_backward() -> None:
    torch.manual_seed(0)
    n_samples, width = 8, 64
    model = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
    base, experts = cases.experts_of(model, 2)
    merged = MergedModel(model, base, experts, verify=False)
    x = torch.randn(n_samples, 2, width)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        merged(x, weights=torch.rand(n_samples, 2, requires_grad=True)).sum()
    assert max(kept.values()) <= max(2 * width * width * 4, x.numel() * 4)


@settings(max_examples=25, deadline=None)
@given(
    n_samples=st.integers(1, 40),
    n_tokens=st.integers(1, 5),
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    n_experts=st.integers(1, 5),
    n_groups=st.integers(1, 3),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_any_k_any_groups(
    n_samples: int, n_tokens: int, widths: list[int], n_experts: int, n_groups: int, has_bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b, bias=has_bias) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))).double()
    base, experts = cases.experts_of(model, n_experts)
    index = {name: i % n_groups for i, name in enumerate(base)}
    n_groups = 1 + max(index.values())
    x = torch.randn(n_samples, n_tokens, widths[0], dtype=torch.float64)
    w = torch.randn(n_samples, n_groups, n_experts, dtype=torch.float64, requires_grad=True)
    found = MergedModel(model, base, experts, index)(x, weights=w)
    (gradient,) = torch.autograd.grad(found.square().sum(), w)
    wanted = cases.reference(model, base, task_vectors(base, experts), x, w, index)
    (gradient_ref,) = torch.autograd.grad(wanted.square().sum(), w)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert torch.allclose(gradient, gradient_ref, rtol=1e-7, atol=1e-9)
