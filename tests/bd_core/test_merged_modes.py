"""Modes of the merged model beside exact, other dtypes, and torch.compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import merged_cases as cases
import pytest
import torch
from torch import Tensor

from bd_core.compression import svd_compress
from bd_core.merged import MergedModel
from bd_core.merged.routing import shared_copies
from bd_core.task_vectors import layer_groups, task_vectors


def parts(case: cases.Case, n_experts: int = 3) -> Any:
    torch.manual_seed(7)
    model, inputs = case()
    base, experts = cases.experts_of(model, n_experts)
    groups = layer_groups(base)
    weights = torch.softmax(torch.randn(len(inputs), groups.n_groups, n_experts), -1)
    return model, inputs, base, experts, groups, weights


def first(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]  # type: ignore[index]


@pytest.mark.parametrize("case", [*cases.NATIVE, *cases.THROUGH_VMAP], ids=lambda case: case.__name__)
def test_low_rank_is_exact_on_the_cut_vectors(case: cases.Case) -> None:
    model, inputs, base, experts, groups, weights = parts(case)
    compressed = svd_compress(task_vectors(base, experts), rank=2)
    outputs = []
    for merged in (
        MergedModel(model, base, compressed, groups),
        MergedModel(model, base, compressed.expanded(), groups),
    ):
        w = weights.clone().requires_grad_()
        y = first(merged(inputs, weights=w))
        outputs.append((y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), w)))
    for found, wanted in zip(*outputs, strict=True):
        assert cases.relative_error(found, wanted) <= 1e-5


def test_low_rank_knows_each_parameters_error_and_needs_factors() -> None:
    model, _, base, experts, groups, _ = parts(cases.mlp)
    compressed = svd_compress(task_vectors(base, experts), rank=2)
    merged = MergedModel(model, base, compressed, groups)
    assert merged.mode == "low_rank"
    assert merged.relative_error == compressed.relative_error
    with pytest.raises(ValueError, match="svd_compress"):
        MergedModel(model, base, experts, groups, mode="low_rank")
    with pytest.raises((ValueError, TypeError), match="'fast'"):
        MergedModel(model, base, experts, groups, mode="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("case", cases.NATIVE, ids=lambda case: case.__name__)
def test_grouped_equals_exact_where_weights_are_equal(case: cases.Case) -> None:
    model, inputs, base, experts, groups, weights = parts(case)
    which = torch.arange(15) % 3  # fifteen samples, three sets of weights, interleaved
    inputs, weights = inputs.repeat(3, *(1,) * (inputs.ndim - 1)), weights[which]
    exact = MergedModel(model, base, experts, groups)
    grouped = MergedModel(model, base, experts, groups, mode="grouped", max_distance=1e-6)
    with torch.no_grad():
        found, wanted = first(grouped(inputs, weights=weights)), first(exact(inputs, weights=weights))
    assert cases.relative_error(found, wanted) <= 1e-5


def test_grouped_moves_a_parameter_no_further_than_its_bound() -> None:
    model, inputs, base, experts, groups, weights = parts(cases.mlp)
    near = (weights[:1] + 0.01 * torch.rand(8, *weights.shape[1:])).contiguous()
    grouped = MergedModel(model, base, experts, groups, mode="grouped", max_distance=0.05)
    assert len(shared_copies(near, 0.05)) == 1
    bound, vectors = grouped.weight_error_bound(), task_vectors(base, experts)
    for name, stacked in vectors.vectors.items():
        apart = (near - near[:1])[:, groups.index[name]]
        moved = torch.tensordot(apart, stacked, dims=1).flatten(1).norm(dim=1).max()
        assert float(moved) <= bound[name] * (1 + 1e-5)
    with torch.no_grad():
        x = inputs[:1].expand(8, -1)
        together = grouped(x, weights=near)
    assert cases.relative_error(together[7], together[0]) <= 1e-6


def test_grouped_is_exact_in_training_and_with_many_sets_of_weights() -> None:
    model, inputs, base, experts, groups, weights = parts(cases.mlp)
    exact = MergedModel(model, base, experts, groups)
    grouped = MergedModel(model, base, experts, groups, mode="grouped", max_distance=0.5)
    w = weights[:1].expand_as(weights).contiguous().requires_grad_()
    assert torch.equal(grouped(inputs, weights=w), exact(inputs, weights=w))
    with torch.no_grad():
        far = torch.eye(3)[torch.arange(5) % 3][:, None].expand_as(weights)
        assert torch.equal(grouped(inputs, weights=far), exact(inputs, weights=far))


@pytest.mark.parametrize("case", [cases.conv_net, cases.open_clip_vit], ids=lambda case: case.__name__)
def test_static_state_is_the_model_merged_with_mean_weights(case: cases.Case) -> None:
    model, inputs, base, experts, groups, weights = parts(case)
    merged = MergedModel(model, base, experts, groups)
    state = merged.static_state(weights)
    assert {name: (t.shape, t.dtype) for name, t in state.items()} == {
        name: (t.shape, t.dtype) for name, t in base.items()
    }
    wanted = merged(inputs, weights=weights.mean(0, keepdim=True).expand_as(weights))
    model.eval().load_state_dict(state)
    assert cases.relative_error(model(inputs), wanted) <= 1e-5
    with pytest.raises(ValueError, match="weights has shape"):
        merged.static_state(weights[..., :2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [None, 2], ids=["exact", "low_rank"])
@pytest.mark.parametrize("case", [cases.mlp, cases.open_clip_vit], ids=lambda case: case.__name__)
def test_half_precision_models(case: cases.Case, rank: int | None, dtype: torch.dtype) -> None:
    model, inputs, base, experts, groups, weights = parts(case)
    vectors = task_vectors(base, experts)
    if rank is not None:
        vectors = svd_compress(vectors, rank=rank)
    wanted = MergedModel(model, base, vectors, groups)(inputs, weights=weights)
    half = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    merged = MergedModel(model.to(dtype), half, vectors, groups)
    found = merged(inputs.to(dtype), weights=weights)
    assert found.dtype == dtype
    assert merged.fallback_reason is None
    assert cases.relative_error(found.float(), wanted) <= (3e-2 if dtype == torch.bfloat16 else 4e-3)


def test_it_compiles_without_graph_breaks() -> None:
    # A process of its own: the shape checks of the test run are Python that cannot be traced.
    script = Path(__file__).with_name("compiled_cases.py")
    paths = os.pathsep.join(map(str, (script.parent, script.parents[2])))
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["mlp", "open_clip_vit", "timm_vit"]
