"""ACE-Merging against its formula, expert by expert in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from matrix_cases import MATRICES, apart, mean_steps, states, vectors
from torch import Tensor

from bd_core.methods.ace import ace


def gamma(taus: list[Tensor]) -> float:
    logs = [math.log(float(tau.square().sum())) for tau in taus]
    mean = sum(logs) / len(logs)
    return sum((value - mean) ** 2 for value in logs) / len(logs) / mean**2


def slow_ace(origin: Tensor, taus: list[Tensor], variant: str, epsilon: float, gate: float, share: float) -> Tensor:
    """The step from theta_0."""
    width = origin.shape[1]
    one = torch.eye(width).double()
    is_open = gamma(taus) > gate
    centred = [tau - tau.mean(0) for tau in taus]
    weights = [origin + tau for tau in taus] if variant == "paper" else centred
    scaled, regular = [], []
    for own in centred:
        sigma = own.T @ own
        trace = float(sigma.trace()) if is_open else 1.0
        scaled.append(sigma / trace)
        regular.append(sigma / trace + epsilon / trace * one)
    rows = torch.stack(scaled).sum(0)
    prior = torch.zeros(width, width).double()
    for i in range(width):
        for j in range(width):
            prior[i, j] = sum(float(rows[m, j]) for m in range(width)) / width
    upper = sum(weight @ sigma for weight, sigma in zip(weights, regular, strict=True))
    result = upper @ torch.linalg.inv(sum(regular) + prior)
    if is_open:
        residual = sum(weight @ (sigma - rows / len(taus)) for weight, sigma in zip(weights, scaled, strict=True))
        u, s, vh = torch.linalg.svd(residual + result, full_matrices=False)
        count = math.floor(share * int((s > 1e-9 * s[0]).sum()))
        result = result + s[:count].mean() * u[:, :count] @ vh[:count]
    return result - origin if variant == "paper" else result


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("gate", [0.0, 1e9])
def test_ace_is_its_formula(variant: Any, gate: float, dtype: torch.dtype, most: float) -> None:
    base, experts = states(3, dtype=dtype)
    found = dict(ace(base, experts, variant=variant, epsilon=1e-2, gate=gate, rank_share=0.4))
    for name in MATRICES:
        origin, taus = base[name].double(), vectors(base, experts, name)
        assert apart(found[name], base[name], slow_ace(origin, taus, variant, 1e-2, gate, 0.4)) <= most, name
    for name, step in mean_steps(base, experts):
        assert apart(found[name], base[name], step) <= most, name


def test_the_gate_opens_for_task_vectors_of_mixed_sizes() -> None:
    """|D_k|^2 from 1e-3 to 10: gamma is 1.3, above the default 0.3; of like sizes it is below."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(16, 8, generator=generator).double()}
    for sizes, is_open in (((1e-3, 0.1, 10.0), True), ((8.0, 9.0, 10.0), False)):
        taus = [torch.randn(16, 8, generator=generator).double() for _ in sizes]
        taus = [tau * math.sqrt(size) / tau.norm() for tau, size in zip(taus, sizes, strict=True)]
        assert (gamma(taus) > 0.3) == is_open
        found = dict(ace(base, [{"w": base["w"] + tau} for tau in taus]))["w"]
        assert apart(found, base["w"], slow_ace(base["w"], taus, "released", 1e-2, 0.3, 0.3)) <= 1e-8


def test_defaults_follow_the_variant() -> None:
    base, experts = states(3)
    for variant, epsilon in (("paper", 1e-5), ("released", 1e-2)):
        found = dict(ace(base, experts, variant=variant))  # type: ignore[arg-type]
        wanted = dict(ace(base, experts, variant=variant, epsilon=epsilon))  # type: ignore[arg-type]
        assert all(torch.equal(found[name], wanted[name]) for name in base)


@pytest.mark.parametrize(("dtype", "leak"), [(torch.float64, 1e-8), (torch.float32, 2e-2)])
@pytest.mark.parametrize("epsilon", [1e-2, 1e-5])
def test_experts_that_share_a_lora_factor(epsilon: float, dtype: torch.dtype, leak: float) -> None:
    """Their covariances have the factor's rank, 2 of 12: epsilon alone keeps the inverse, and nothing is blown up.

    In float32 the checkpoints' own rounding, 1e-7 of the weights, is what the inverse enlarges: up to 1 % here.
    """
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(16, 12, generator=generator).to(dtype)}
    shared = torch.randn(2, 12, generator=generator).to(dtype)
    taus = [0.1 * torch.randn(16, 2, generator=generator).to(dtype) @ shared for _ in range(4)]
    found = dict(ace(base, [{"w": base["w"] + tau} for tau in taus], epsilon=epsilon))["w"]
    step = found - base["w"]
    assert float(step.norm()) <= sum(float(tau.norm()) for tau in taus)
    outside = torch.linalg.svd(shared)[2][2:].T  # what no expert changed
    assert float((step @ outside).norm()) <= leak * float(step.norm())


def test_layers_taken_together_are_those_taken_one_by_one_whatever_the_threads() -> None:
    draw, side = torch.Generator().manual_seed(0), 512  # smaller ones meet no thread of MKL's
    base = {name: torch.randn(side, side, generator=draw) for name in ("a", "b")}
    experts = [{n: w + 0.01 * torch.randn(side, side, generator=draw) for n, w in base.items()} for _ in range(2)]
    given = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = dict(ace(base, experts))
    finally:
        torch.set_num_threads(given)
    for name, merged in together.items():
        alone = dict(ace({name: base[name]}, [{name: expert[name]} for expert in experts]))[name]
        assert apart(merged, base[name], alone - base[name]) < 1e-6


def test_an_inverse_that_speaks_louder_than_the_experts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = states(3)
    monkeypatch.setattr("bd_core.methods.ace.MAX_GROWTH", 0.01)
    with pytest.raises(ValueError, match=r"ace: blocks\.0\.attn\.weight: the merged step .* Raise epsilon=0.01"):
        dict(ace(base, experts))


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"variant": "mine"}, "variant(.|\\n)*'mine'"),
        ({"epsilon": 0.0}, "epsilon=0.0 must be above 0"),
        ({"gate": -1.0}, "gate=-1.0 must not be negative"),
        ({"rank_share": 0.0}, "rank_share=0.0 must lie in"),
    ],
)
def test_settings(setting: dict[str, Any], text: str) -> None:
    base, experts = states()
    with pytest.raises((ValueError, TypeError), match=text):
        ace(base, experts, **setting)
