"""Model Stock against its definition, and the geometry it stands for."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd_core.methods import stream
from bd_core.methods.model_stock import model_stock

State = dict[str, Tensor]


def states(n_experts: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[State, list[State]]:
    """Experts that agree in part, as fine-tuned copies of one base do."""
    generator = torch.Generator().manual_seed(seed)
    base = {"w": torch.randn(4, 5, generator=generator), "n": torch.tensor(3), "b": torch.randn(6, generator=generator)}
    common = {name: torch.randn(base[name].shape, generator=generator) for name in ("w", "b")}
    experts = []
    for _ in range(n_experts):
        moved = {name: base[name] + c + torch.randn(c.shape, generator=generator) for name, c in common.items()}
        experts.append({name: moved.get(name, tensor) for name, tensor in base.items()})
    cast = [{name: t.to(dtype) if t.is_floating_point() else t for name, t in s.items()} for s in (base, *experts)]
    return cast[0], cast[1:]


def slow_tensor(origin: Tensor, experts: list[Tensor], average: str) -> list[float]:
    taus = [(expert - origin).flatten().tolist() for expert in experts]
    n_experts, cosines = len(taus), []
    for j in range(n_experts):
        for k in range(j):
            dot = sum(a * b for a, b in zip(taus[j], taus[k], strict=True))
            norms = math.sqrt(sum(a * a for a in taus[j])) * math.sqrt(sum(b * b for b in taus[k]))
            cosines.append(dot / norms)
    if average == "cosine":
        cosine = sum(cosines) / len(cosines)
    else:
        cosine = math.cos(sum(map(math.acos, cosines)) / len(cosines))
    t = n_experts * cosine / (1 + (n_experts - 1) * cosine)
    return [o + t * sum(tau[i] for tau in taus) / n_experts for i, o in enumerate(origin.flatten().tolist())]


@settings(max_examples=30)
@given(n_experts=st.integers(2, 5), average=st.sampled_from(["cosine", "angle"]), seed=st.integers(0, 99))
def test_model_stock_equals_its_definition(n_experts: int, average: Any, seed: int) -> None:
    base, experts = states(n_experts, seed)
    found = dict(model_stock(base, experts, average=average))
    for name in ("w", "b"):
        wanted = slow_tensor(base[name], [expert[name] for expert in experts], average)
        assert found[name].flatten().tolist() == pytest.approx(wanted, abs=1e-9)


def test_two_experts_give_the_papers_ratio_and_both_averages_agree() -> None:
    base = {"w": torch.zeros(2, dtype=torch.float64)}
    angle = math.radians(60)
    experts = [{"w": torch.tensor([1.0, 0.0]).double()}, {"w": torch.tensor([math.cos(angle), math.sin(angle)])}]
    experts[1]["w"] = experts[1]["w"].double()
    found = dict(model_stock(base, experts))["w"]
    t = 2 * 0.5 / (1 + 0.5)  # t = 2 cos / (1 + cos)
    assert torch.allclose(found, t * (experts[0]["w"] + experts[1]["w"]) / 2, atol=1e-6)
    assert torch.allclose(found, dict(model_stock(base, experts, average="angle"))["w"], atol=1e-12)


def test_a_tensor_of_many_chunks_has_one_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = states()
    whole = dict(model_stock(base, experts))
    monkeypatch.setattr(stream, "CHUNK", 7)
    parts = dict(model_stock(base, experts))
    assert all(torch.allclose(parts[name], whole[name], atol=1e-12) for name in ("w", "b"))


def test_experts_change_places_freely_and_inputs_are_kept() -> None:
    base, experts = states()
    kept = copy.deepcopy((base, experts))
    first, other = dict(model_stock(base, experts)), dict(model_stock(base, experts[::-1]))
    assert set(first) == set(base) and first["n"] == 3
    assert all(torch.allclose(first[name], other[name], atol=1e-12) for name in ("w", "b"))
    for state, before in zip((base, *experts), (kept[0], *kept[1]), strict=True):
        assert all(torch.equal(state[name], before[name]) for name in state)


def test_degenerate_experts() -> None:
    base, experts = states(dtype=torch.float32)
    opposed = {name: base[name] - (experts[0][name] - base[name]) for name in base}
    for some, wanted in (
        ([experts[0]], experts[0]),
        ([experts[0]] * 3, experts[0]),  # one direction: t = 1
        ([base] * 2, base),
        ([base, experts[0]], base),  # orthogonal by convention: t = 0
        ([experts[0], opposed], base),  # they cancel
    ):
        found = dict(model_stock(base, some))
        assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in ("w", "b"))


def test_half_precision_is_rounded_once() -> None:
    base, experts = states(dtype=torch.bfloat16)
    wide = [{name: t.float() if t.is_floating_point() else t for name, t in s.items()} for s in (base, *experts)]
    found, wanted = dict(model_stock(base, experts)), dict(model_stock(wide[0], wide[1:]))
    assert torch.equal(found["w"], wanted["w"].bfloat16())


def test_an_unknown_average_is_refused_at_once() -> None:
    with pytest.raises((ValueError, TypeError), match=r"average(.|\n)*'median'"):
        model_stock({}, [], average="median")  # type: ignore[arg-type]
