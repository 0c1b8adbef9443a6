"""PCB-Merging against its definition, written out entry by entry."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd_core.methods.pcb import pcb

State = dict[str, Tensor]


def states(n_experts: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(seed)

    def one() -> State:
        return {
            "w": torch.randn(6, 7, generator=generator).to(dtype),
            "n": torch.tensor(3),
            "b": torch.randn(9, generator=generator).to(dtype),
        }

    return one(), [one() for _ in range(n_experts)]


def flat(state: State) -> Tensor:
    return torch.cat([state["w"].double().flatten(), state["b"].double().flatten()])


def slow_pcb(base: State, experts: list[State], keep: float, scale: float, clamp: float, agreement: str) -> list[float]:
    taus = [(flat(expert) - flat(base)).tolist() for expert in experts]
    n_experts, size = len(taus), len(taus[0])
    clamped, unit = [], []
    for tau in taus:
        ordered = sorted(abs(value) for value in tau)
        low, high = ordered[int(size * clamp)], ordered[int(size * (1 - clamp) - 1)]
        held = [min(max(abs(value), low), high) for value in tau]
        clamped.append([math.copysign(a, value) for a, value in zip(held, tau, strict=True)])
        unit.append([(a - low) / (high - low) for a in held])
    shares = []
    for k, tau in enumerate(taus):
        scores = []
        for i, value in enumerate(tau):
            if agreement == "sum":
                total = sum(other[i] for other in taus)
            else:
                total = sum(math.copysign(unit[j][i], taus[j][i]) for j in range(n_experts))
            scores.append(math.exp(n_experts * unit[k][i] ** 2) * math.tanh(value * total))
        least, most = sorted(scores)[int(size * (1 - keep))], max(scores)
        shares.append([(max(score, least) - least) / (most - least) for score in scores])
    merged = []
    for i, origin in enumerate(flat(base).tolist()):
        total = max(sum(share[i] for share in shares), 1e-12)
        merged.append(origin + scale * sum(shares[k][i] * clamped[k][i] for k in range(n_experts)) / total)
    return merged


@settings(max_examples=25)
@given(
    n_experts=st.integers(1, 4),
    keep=st.sampled_from([0.05, 0.1, 0.5]),
    clamp=st.sampled_from([0.0, 0.01, 0.1]),
    agreement=st.sampled_from(["sum", "normalised"]),
    seed=st.integers(0, 99),
)
def test_pcb_equals_its_definition(n_experts: int, keep: float, clamp: float, agreement: Any, seed: int) -> None:
    base, experts = states(n_experts, seed)
    found = flat(dict(pcb(base, experts, keep=keep, clamp=clamp, agreement=agreement))).tolist()
    assert found == pytest.approx(slow_pcb(base, experts, keep, 1.2, clamp, agreement), abs=1e-9)


def test_experts_change_places_freely_and_inputs_are_kept() -> None:
    base, experts = states()
    kept = copy.deepcopy((base, experts))
    first, other = dict(pcb(base, experts)), dict(pcb(base, experts[::-1]))
    assert set(first) == set(base) and first["n"] == 3
    assert torch.allclose(flat(first), flat(other), atol=1e-12)
    for state, before in zip((base, *experts), (kept[0], *kept[1]), strict=True):
        assert all(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize("agreement", ["sum", "normalised"])
def test_degenerate_experts_give_finite_entries(agreement: Any) -> None:
    base, experts = states(dtype=torch.float32)
    level = {"w": base["w"] + 0.5, "n": base["n"], "b": base["b"] + 0.5}
    for some in ([base] * 3, [base, experts[0]], [experts[0]] * 3, experts[:1], [level, level]):
        assert torch.isfinite(flat(dict(pcb(base, some, agreement=agreement)))).all()
    assert torch.equal(flat(dict(pcb(base, [base] * 2))), flat(base))


def test_equal_scores_all_count() -> None:
    """As released, the least kept entry weighs 0, and equal scores 0/0; here they are kept together."""
    base = {"w": torch.zeros(4, 5)}
    moved = dict(pcb(base, [{"w": torch.full((4, 5), 0.5)}] * 2, scale=1.0))["w"]
    assert torch.equal(moved, torch.full((4, 5), 0.5))


def test_half_precision_is_rounded_once() -> None:
    base, experts = states(dtype=torch.bfloat16)
    wide = [{name: t.float() if t.is_floating_point() else t for name, t in s.items()} for s in (base, *experts)]
    found, wanted = dict(pcb(base, experts)), dict(pcb(wide[0], wide[1:]))
    assert found["w"].dtype == torch.bfloat16
    assert torch.equal(found["w"], wanted["w"].bfloat16())


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"keep": 0.0}, r"keep=0\.0 must lie in \(0, 1\]"),
        ({"clamp": 0.5}, r"clamp=0\.5"),
        ({"scale": math.inf}, "scale=inf"),
        ({"agreement": "max"}, "agreement(.|\\n)*'max'"),
    ],
)
def test_wrong_settings_are_refused_at_once(parameters: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        pcb({}, [], **parameters)
