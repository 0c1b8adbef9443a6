"""MAP: quadratics recovered, fronts by definition, a chosen model that is at least as good as every sampled one."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd_core.methods.pareto_map import (
    Surrogates,
    fit_surrogates,
    n_terms,
    non_dominated,
    pareto_map,
    sample_coefficients,
    search_at_random,
    weighted_sum,
)

State = dict[str, Tensor]


def states(n_experts: int = 3, dtype: torch.dtype = torch.float32) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(0)

    def one() -> State:
        return {"w": torch.randn(3, 4, generator=generator).to(dtype), "n": torch.tensor(3)}

    return one(), [one() for _ in range(n_experts)]


def quadratics(n_experts: int, n_metrics: int, seed: int) -> Surrogates:
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(n_metrics, n_experts, n_experts, generator=generator, dtype=torch.float64)
    linear, constant = torch.randn(n_metrics, n_experts, generator=generator).double(), torch.ones(n_metrics).double()
    return Surrogates(half + half.mT, linear, constant, constant, 1.0)


@settings(max_examples=25)
@given(n_experts=st.integers(1, 5), n_metrics=st.integers(1, 4), seed=st.integers(0, 99))
def test_fitting_recovers_a_quadratic(n_experts: int, n_metrics: int, seed: int) -> None:
    truth = quadratics(n_experts, n_metrics, seed)
    c = sample_coefficients(n_terms(n_experts) + 3, n_experts, seed=seed)
    metrics = [
        [
            float(e + sum(b[i] * x[i] for i in range(n_experts)))
            + 0.5 * sum(float(a[i, j] * x[i] * x[j]) for i in range(n_experts) for j in range(n_experts))
            for a, b, e in zip(truth.quadratic_TKK, truth.linear_TK, truth.constant_T, strict=True)
        ]
        for x in c
    ]
    found = fit_surrogates(c, torch.tensor(metrics, dtype=torch.float64))
    assert torch.allclose(found.quadratic_TKK, truth.quadratic_TKK, atol=1e-5)
    assert torch.allclose(found.linear_TK, truth.linear_TK, atol=1e-5)
    assert torch.allclose(found.predict(c), torch.tensor(metrics, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(found.r_squared_T, torch.ones(n_metrics).double())


def test_r_squared_is_the_share_explained() -> None:
    c = sample_coefficients(400, 2, seed=0)
    noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = fit_surrogates(c, torch.stack((c[:, 0] + noise[:, 0], torch.ones(400).double()), dim=1))
    assert float(found.r_squared_T[0]) == pytest.approx(1 / 13, abs=0.06)  # Var c / (Var c + Var noise)
    assert float(found.r_squared_T[1]) == 1.0


@settings(max_examples=40)
@given(n_points=st.integers(1, 30), n_metrics=st.integers(1, 3), levels=st.integers(2, 6), seed=st.integers(0, 99))
def test_non_dominated_equals_its_definition(n_points: int, n_metrics: int, levels: int, seed: int) -> None:
    points = torch.randint(levels, (n_points, n_metrics), generator=torch.Generator().manual_seed(seed)).float()
    rows = points.tolist()
    wanted = [
        not any(all(a >= b for a, b in zip(q, p, strict=True)) and q != p for q in rows)  # q dominates p
        for p in rows
    ]
    assert non_dominated(points).tolist() == wanted


def test_weighted_sum_equals_its_definition() -> None:
    base, experts = states()
    found = dict(weighted_sum(base, experts, coefficients=[0.5, 0.0, -1.0]))
    wanted = base["w"] + 0.5 * (experts[0]["w"] - base["w"]) - (experts[2]["w"] - base["w"])
    assert torch.allclose(found["w"], wanted, atol=1e-6) and found["n"] == 3
    assert torch.equal(dict(weighted_sum(base, experts, coefficients=[0.0] * 3))["w"], base["w"])
    with pytest.raises(ValueError, match="1 coefficients for 3 experts"):
        weighted_sum(base, experts, coefficients=[1.0])
    with pytest.raises(ValueError, match="must be finite"):
        weighted_sum(base, experts, coefficients=[math.nan] * 3)


def nearness(experts: list[State]) -> Any:
    def validate(state: State) -> Tensor:
        return torch.stack([-(state["w"].double() - e["w"].double()).square().mean() for e in experts])

    return validate


@pytest.mark.parametrize("kind", ["general", "identical", "equal_to_base", "single", "bfloat16"])
def test_the_chosen_model_is_measured_and_no_sample_is_better(kind: str) -> None:
    base, experts = states(dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    some = {"identical": [experts[0]] * 3, "equal_to_base": [base] * 3, "single": experts[:1]}.get(kind, experts)
    kept, validate = copy.deepcopy((base, some)), nearness(some)
    found = pareto_map(base, some, validate=validate, search=lambda s: search_at_random(s)[:500])
    assert torch.isfinite(found.merged["w"]).all() and list(found.merged) == list(base)
    assert found.merged["w"].dtype == base["w"].dtype
    assert torch.allclose(validate(found.merged), found.metrics)
    for c in sample_coefficients(2 * n_terms(len(some)), len(some), seed=0):
        other = dict(weighted_sum(base, some, coefficients=c.tolist()))
        assert float(validate(other).mean()) <= float(found.metrics.mean()) + 1e-9
    assert bool(non_dominated(found.predicted).all())
    for state, before in zip((base, *some), (kept[0], *kept[1]), strict=True):
        assert all(torch.equal(state[name], before[name]) for name in state)


def test_preferences_and_seeds() -> None:
    base, experts = states()
    validate = nearness(experts)
    first = pareto_map(base, experts, validate=validate, preference=[1.0, 0.0, 0.0])
    assert int(first.metrics.argmax()) == 0
    # Metrics are quadratic in c here: the front's best lies as near the optimum, expert 0 itself, as it was sampled.
    assert float(first.metrics[0]) > 0.1 * float(validate(base)[0])
    again = pareto_map(base, experts, validate=validate, preference=[1.0, 0.0, 0.0])
    assert torch.equal(first.merged["w"], again.merged["w"])
    assert not torch.equal(sample_coefficients(4, 2, seed=0), sample_coefficients(4, 2, seed=1))
    assert float(sample_coefficients(99, 2, seed=0, upper=0.5).max()) <= 0.5


def test_what_is_refused() -> None:
    base, experts = states()
    line = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None].expand(-1, 2)
    for c, m, text in (
        (torch.rand(5, 2), torch.rand(5, 1), "5 samples leave the 6 terms"),
        (line, line, "vary them more"),
        (torch.rand(9, 2), torch.full((9, 1), math.nan), "metrics of sample 0 are not finite"),
    ):
        with pytest.raises(ValueError, match=text):
            fit_surrogates(c, m)
    for parameters, text in (
        ({"samples": 0}, "samples=0"),
        ({"samples": 3}, "3 samples leave"),
        ({"upper": 0.0}, r"upper=0\.0"),
        ({"verified": -1}, "verified=-1"),
        ({"preference": [0.0, 0.0, 0.0]}, "not all 0"),
        ({"preference": [1.0]}, "1 preferences for 3 metrics"),
    ):
        with pytest.raises(ValueError, match=text):
            pareto_map(base, experts, validate=nearness(experts), **parameters)  # type: ignore[arg-type]
