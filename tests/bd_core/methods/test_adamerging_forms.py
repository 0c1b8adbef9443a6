"""AdaMerging task-wise and on Ties-trimmed task vectors; the layer-wise form is tested with all methods."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bd_core.methods.adamerging import adamerging
from bd_core.methods.ties import ties

State = dict[str, Tensor]
NAMES = ("w", "b")


def states(n_experts: int = 3, dtype: torch.dtype = torch.float32) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(0)

    def one() -> State:
        return {
            "w": torch.randn(3, 4, generator=generator).to(dtype),
            "b": torch.randn(3, generator=generator).to(dtype),
            "n": torch.tensor(3),
        }

    return one(), [one() for _ in range(n_experts)]


def logits(parameters: State, batch: Tensor, task: str) -> Tensor:
    scores = F.linear(batch, parameters["w"].float(), parameters["b"].float())
    return scores if task == "a" else -scores


def batches() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield {task: torch.randn(8, 4, generator=generator) for task in ("a", "b")}


def ties_left(base: State, experts: list[State], keep: float) -> list[State]:
    """What Ties sums, expert by expert, by sorting and comparing signs."""
    taus = [torch.cat([(expert[name] - base[name]).flatten() for name in NAMES]).tolist() for expert in experts]
    trimmed = []
    for tau in taus:
        ordered = sorted(map(abs, tau))
        least = ordered[len(tau) - int(keep * len(tau)) - 1]
        trimmed.append([value if abs(value) >= least else 0.0 for value in tau])
    totals = [sum(column) for column in zip(*trimmed, strict=True)]
    left = [[v if v * total > 0 else 0.0 for v, total in zip(tau, totals, strict=True)] for tau in trimmed]
    return [{"w": torch.tensor(tau[:12]).view(3, 4), "b": torch.tensor(tau[12:])} for tau in left]


def slow_coefficients(base: State, taus: list[State], granularity: str, steps: int) -> Tensor:
    """All tasks' graphs summed, autograd through the merge."""
    raw = torch.full((2 if granularity == "layer" else 1, len(taus)), 0.3, requires_grad=True)
    optimiser, stream = torch.optim.Adam([raw], lr=1e-3), batches()
    for _ in range(steps):
        lambdas = raw.clamp(0, 1).expand(2, -1)
        merged = {
            name: base[name] + sum(lambdas[i, k] * tau[name] for k, tau in enumerate(taus))
            for i, name in enumerate(NAMES)
        }
        loss = torch.zeros(())
        for task, batch in next(stream).items():
            p = logits(merged, batch, task).softmax(-1)
            loss = loss - (p * p.log()).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return raw.detach().clamp(0, 1).expand(2, -1)


@pytest.mark.parametrize("granularity", ["layer", "task"])
@pytest.mark.parametrize("keep", [None, 0.4])
def test_every_form_equals_autograd_through_the_merge(granularity: Any, keep: float | None) -> None:
    base, experts = states()
    taus = [{n: e[n] - base[n] for n in NAMES} for e in experts] if keep is None else ties_left(base, experts, keep)
    found = adamerging(base, experts, logits=logits, batches=batches(), steps=20, granularity=granularity, keep=keep)
    assert found.coefficients.shape == (2, 3)
    assert torch.allclose(found.coefficients, slow_coefficients(base, taus, granularity, 20), atol=1e-5)
    assert (granularity == "task") == torch.equal(found.coefficients[0], found.coefficients[1])
    for i, name in enumerate(NAMES):
        step = sum(float(found.coefficients[i, k]) * tau[name] for k, tau in enumerate(taus))
        assert torch.allclose(found.merged[name], base[name] + step, atol=1e-5)


def test_plus_plus_with_equal_coefficients_is_ties() -> None:
    base, experts = states()
    found = adamerging(base, experts, logits=logits, batches=batches(), steps=1, learning_rate=0.0, keep=0.2)
    wanted = dict(ties(base, experts, keep=0.2, scale=0.3))
    assert all(torch.allclose(found.merged[name], wanted[name], atol=1e-6) for name in base)


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_degenerate_experts_half_precision_and_inputs(granularity: Any) -> None:
    base, experts = states(dtype=torch.bfloat16)
    kept = copy.deepcopy((base, experts))
    for some in ([base] * 3, [base, experts[0]], [experts[0]] * 3, experts[:1], experts):
        found = adamerging(base, some, logits=logits, batches=batches(), steps=3, granularity=granularity, keep=0.2)
        assert found.merged["w"].dtype == torch.bfloat16
        assert all(torch.isfinite(found.merged[name]).all() for name in NAMES)
    for state, before in zip((base, *experts), (kept[0], *kept[1]), strict=True):
        assert all(torch.equal(state[name], before[name]) for name in state)


def test_experts_change_places_freely() -> None:
    base, experts = states()
    one, other = (
        adamerging(base, some, logits=logits, batches=batches(), steps=10, keep=0.5)
        for some in (experts, experts[::-1])
    )
    assert torch.allclose(one.coefficients, other.coefficients.flip(1), atol=1e-5)


def test_what_is_refused() -> None:
    base, experts = states()
    for parameters, text in (
        ({"keep": 0.0}, r"keep=0\.0"),
        ({"granularity": "tensor"}, r"granularity(.|\n)*'tensor'"),
        ({"initial": math.nan}, "initial=nan"),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            adamerging(base, experts, logits=logits, batches=batches(), **parameters)  # type: ignore[arg-type]
