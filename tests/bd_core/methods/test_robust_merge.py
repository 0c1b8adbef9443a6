"""RobustMerge on LoRA adapters: its definition entry by entry, PEFT's names, and adapters that do not fit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd_core.methods.robust_merge import merge_adapters, robust_merge

State = dict[str, Tensor]
RANK, SHAPES = 5, {"encoder.q": (6, 4), "encoder.v": (3, 4)}
PREFIX = "base_model.model."


def adapters(n: int = 3, seed: int = 0, prefix: str = PREFIX, dtype: torch.dtype = torch.float64) -> list[State]:
    generator = torch.Generator().manual_seed(seed)

    def one() -> State:
        made = {}
        for module, (n_out, n_in) in SHAPES.items():
            made[f"{prefix}{module}.lora_A.weight"] = torch.randn(RANK, n_in, generator=generator).to(dtype)
            made[f"{prefix}{module}.lora_B.weight"] = torch.randn(n_out, RANK, generator=generator).to(dtype)
        return made | {f"{prefix}classifier.bias": torch.randn(3, generator=generator).to(dtype)}

    return [one() for _ in range(n)]


def a_base(dtype: torch.dtype = torch.float64) -> State:
    generator = torch.Generator().manual_seed(9)
    base = {f"{module}.weight": torch.randn(shape, generator=generator).to(dtype) for module, shape in SHAPES.items()}
    return base | {"classifier.bias": torch.zeros(3, dtype=dtype), "steps": torch.tensor(3)}


def slow_pruned(rows: list[list[float]], keep: float) -> list[list[float]]:
    ordered = sorted(abs(value) for row in rows for value in row)
    rank = int(len(ordered) * (1 - keep))
    least = ordered[rank - 1] if rank else 0.0
    return [[value if abs(value) >= least else 0.0 for value in row] for row in rows]


def slow_factors(
    a_s: list[list[list[float]]], b_s: list[list[list[float]]], keep: float, top_rows: float
) -> tuple[list[list[float]], list[list[float]]]:
    kept_a, kept_b = [slow_pruned(a, keep) for a in a_s], [slow_pruned(b, keep) for b in b_s]
    scales = []
    for a, kept in zip(a_s, kept_a, strict=True):
        s = []
        for whole, left in zip(a, kept, strict=True):
            size = sum(map(abs, left))
            s.append(sum(map(abs, whole)) / size if size else 1.0)
        least = sorted(s)[int(len(s) * (1 - top_rows))]
        scales.append([max(value, least) for value in s])
    n_in, n_out, tasks = len(a_s[0][0]), len(b_s[0]), range(len(a_s))
    merged_a = [[2 * sum(kept_a[k][r][i] for k in tasks) for i in range(n_in)] for r in range(RANK)]
    merged_b = [
        [2 * sum(scales[k][r] * kept_b[k][o][r] for k in tasks) / sum(scales[k][r] for k in tasks) for r in range(RANK)]
        for o in range(n_out)
    ]
    return merged_a, merged_b


@settings(max_examples=25)
@given(
    n=st.integers(1, 4),
    keep=st.sampled_from([0.1, 0.2, 0.5, 1.0]),
    top_rows=st.sampled_from([0.2, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_robust_merge_equals_its_definition(n: int, keep: float, top_rows: float, seed: int) -> None:
    experts, base = adapters(n, seed), a_base()
    merged = merge_adapters(experts, keep=keep, top_rows=top_rows)
    model = dict(robust_merge(base, experts, scaling=1.5, keep=keep, top_rows=top_rows))
    for module in SHAPES:
        keys = [f"{PREFIX}{module}.lora_{side}.weight" for side in "AB"]
        a, b = slow_factors(*([expert[key].tolist() for expert in experts] for key in keys), keep, top_rows)
        a_RI, b_OR = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
        assert torch.allclose(merged[keys[0]], a_RI, atol=1e-9)
        assert torch.allclose(merged[keys[1]], b_OR, atol=1e-9)
        weight = f"{module}.weight"
        assert torch.allclose(model[weight], base[weight] + 1.5 * b_OR @ a_RI, atol=1e-9)
    bias = sum(expert[f"{PREFIX}classifier.bias"] for expert in experts) / n
    assert torch.allclose(model["classifier.bias"], bias) and model["steps"] == 3
    assert list(merged) == list(experts[0]) and set(model) == set(base)


def test_names_with_and_without_prefix_and_with_an_adapters_name_are_one() -> None:
    plain = adapters(2, prefix="")
    named = {
        key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): t
        for key, t in plain[1].items()
    }
    one = dict(robust_merge(a_base(), adapters(2), scaling=1.0))
    other = dict(robust_merge(a_base(), [plain[0], named], scaling=1.0))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_scalings_are_moved_into_b() -> None:
    """alpha / r of 1 with a B twice as large is alpha / r of 2."""
    experts, base = adapters(2), a_base()
    doubled = {key: 2 * t if "lora_B" in key else t for key, t in experts[1].items()}
    one = dict(robust_merge(base, experts, scaling=[1.0, 2.0]))
    other = dict(robust_merge(base, [experts[0], doubled], scaling=1.0))
    assert all(torch.allclose(one[name].double(), other[name].double()) for name in one)


def test_experts_change_places_freely_and_inputs_are_kept() -> None:
    experts, base = adapters(), a_base()
    kept = copy.deepcopy((base, experts))
    one, other = (dict(robust_merge(base, some, scaling=2.0)) for some in (experts, experts[::-1]))
    assert all(torch.allclose(one[name].double(), other[name].double(), atol=1e-12) for name in one)
    for state, before in zip((base, *experts), (kept[0], *kept[1]), strict=True):
        assert all(torch.equal(state[name], before[name]) for name in state)


def test_degenerate_adapters_give_finite_entries() -> None:
    experts, base = adapters(), a_base()
    zero = {key: torch.zeros_like(t) for key, t in experts[0].items()}
    thin = {key: t.clone() for key, t in experts[0].items()}
    thin[f"{PREFIX}encoder.q.lora_A.weight"][1:] *= 1e-6  # pruning empties four of the five rows
    for some in ([zero] * 2, [zero, experts[0]], [experts[0]] * 3, experts[:1], [thin, experts[1]]):
        assert all(torch.isfinite(t.double()).all() for t in dict(robust_merge(base, some, scaling=1.0)).values())
    unmoved = dict(robust_merge(base, [zero] * 2, scaling=1.0))
    assert all(torch.equal(unmoved[f"{module}.weight"], base[f"{module}.weight"]) for module in SHAPES)


def test_half_precision_computes_wide_and_rounds_once() -> None:
    experts, base = adapters(dtype=torch.bfloat16), a_base(torch.bfloat16)
    wide = [{key: t.float() for key, t in expert.items()} for expert in experts]
    wide_base = {name: t.float() if t.is_floating_point() else t for name, t in base.items()}
    found, wanted = (dict(robust_merge(b, e, scaling=2.0)) for b, e in ((base, experts), (wide_base, wide)))
    assert all(torch.equal(found[name], wanted[name].to(found[name].dtype)) for name in base)
    assert merge_adapters(experts)[f"{PREFIX}encoder.q.lora_A.weight"].dtype == torch.bfloat16


def test_weights_kept_as_inputs_by_outputs() -> None:
    experts, base = adapters(), a_base()
    turned = {name: t.T.contiguous() if t.ndim == 2 else t for name, t in base.items()}
    one = dict(robust_merge(base, experts, scaling=1.0))
    other = dict(robust_merge(turned, experts, scaling=1.0, fan_in_fan_out=True))
    assert torch.allclose(other["encoder.q.weight"].T, one["encoder.q.weight"])


def without(state: State, *parts: str) -> State:
    return {key: t for key, t in state.items() if not any(part in key for part in parts)}


Q_A = f"{PREFIX}encoder.q.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda e: without(e, "encoder.q"), r"expert 1 lacks module encoder\.q"),
        (lambda e: e | {"x.lora_A.weight": torch.ones(5, 4), "x.lora_B.weight": torch.ones(2, 5)}, "adapts module x"),
        (lambda e: without(e, "classifier"), r"expert 1 lacks weight classifier\.bias"),
        (lambda e: without(e, "q.lora_B"), r"encoder\.q has no lora_B"),
        (lambda e: e | {Q_A: torch.ones(4, 4)}, "has rank 4 in A and 5 in B"),
        (
            lambda e: e | {Q_A: torch.ones(4, 4), Q_A.replace("lora_A", "lora_B"): torch.ones(6, 4)},
            r"\[4, 4\] in expert 1, \[5, 4\] in expert 0",
        ),
        (lambda e: e | {Q_A: torch.full((5, 4), math.nan)}, r"expert 1: .*q\.lora_A\.weight holds NaN"),
        (lambda e: e | {"c.lora_A.weight": torch.ones(5, 4, 3, 3)}, "no factor of a linear layer"),
        (lambda e: {"w": torch.ones(2)}, "it is no LoRA adapter"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(change: Any, text: str) -> None:
    experts = adapters(2)
    experts[1] = change(experts[1])
    with pytest.raises(ValueError, match=text):
        merge_adapters(experts)
    with pytest.raises(ValueError, match=text):
        list(robust_merge(a_base(), experts, scaling=1.0))


def test_a_base_that_does_not_fit_and_wrong_settings_are_refused() -> None:
    experts, base = adapters(), a_base()
    with pytest.raises(ValueError, match=r"change encoder\.q\.weight, which the base lacks; the nearest it has"):
        list(robust_merge(without(base, "encoder.q"), experts, scaling=1.0))
    with pytest.raises(ValueError, match=r"by \[6, 4\], the base has \[4, 6\]"):
        list(robust_merge(base | {"encoder.q.weight": torch.ones(4, 6)}, experts, scaling=1.0))
    with pytest.raises(ValueError, match="no expert given"):
        list(robust_merge(base, [], scaling=1.0))
    for parameters, text in (
        ({"scaling": [1.0]}, "1 scalings for 3 adapters"),
        ({"scaling": 0.0}, r"scaling=0\.0"),
        ({"scaling": 1.0, "keep": 0.0}, r"keep=0\.0"),
        ({"scaling": 1.0, "top_rows": 2.0}, r"top_rows=2\.0"),
        ({"scaling": 1.0, "scale": math.inf}, "scale=inf"),
    ):
        with pytest.raises(ValueError, match=text):
            robust_merge(base, experts, **parameters)  # type: ignore[arg-type]
