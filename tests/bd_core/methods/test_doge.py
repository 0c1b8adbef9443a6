"""DOGE against its definition (autograd, full SVDs, float64), and what the released code breaks on."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bd_core.methods.doge import doge

State = dict[str, Tensor]
MATRICES = ("blocks.0.attn.in_proj_weight", "blocks.0.mlp.c_fc.weight", "blocks.1.mlp.c_fc.weight")
SHAPES = {MATRICES[0]: (18, 8), MATRICES[1]: (8, 14), MATRICES[2]: (8, 14), "ln.weight": (8,), "embedding": (9, 8)}


def states(n_experts: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(seed)

    def one(around: State | None) -> State:
        made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
        if around is not None:
            made = {name: around[name].double() + 0.1 * noise for name, noise in made.items()}
        return {name: tensor.to(dtype) for name, tensor in made.items()} | {"count": torch.tensor(3)}

    base = one(None)
    return base, [one(base) for _ in range(n_experts)]


def slow_doge(
    base: State, experts: list[State], scale: float, keep: float, subspace: int, steps: int, learning_rate: float
) -> State:
    taus = [{name: expert[name] - base[name] for name in MATRICES} for expert in experts]
    n_experts, merged = len(taus), dict(base)
    least = []
    for tau in taus:
        magnitudes = torch.cat([tau[name].abs().flatten() for name in MATRICES]).sort().values
        least.append(magnitudes[len(magnitudes) - int(len(magnitudes) * keep) - 1])
    for name in MATRICES:
        lambdas = [scale / tau[name].norm() for tau in taus]
        full = min(base[name].shape)
        leading = [torch.linalg.svd(tau[name], full_matrices=False).U[:, : full // n_experts] for tau in taus]
        side_by_side = torch.cat(leading, dim=1)
        # The singular values of one expert's basis are all 1, so that its SVD would give any rotation of it.
        ordered = side_by_side if n_experts == 1 else torch.linalg.svd(side_by_side, full_matrices=False).U
        shared = ordered[:, : full // subspace]
        delta = torch.zeros_like(base[name], requires_grad=True)
        optimiser = torch.optim.Adam([delta], lr=learning_rate)
        for _ in range(steps):
            optimiser.zero_grad()
            loss = torch.zeros((), dtype=torch.float64)
            for tau in taus:
                moved = sum(weight * (other[name] + delta) for weight, other in zip(lambdas, taus, strict=True))
                for row in range(len(delta)):
                    loss = loss + (tau[name][row] @ (tau[name][row] - moved[row])) ** 2
            loss.backward()
            assert delta.grad is not None
            delta.grad -= shared @ shared.T @ delta.grad
            optimiser.step()
        for k, tau in enumerate(taus):
            mask = tau[name].abs() >= least[k]
            merged[name] = merged[name] + lambdas[k] * mask * (tau[name] + delta.detach())
    return merged


@pytest.mark.parametrize("n_experts", [1, 3])
def test_doge_equals_its_definition(n_experts: int) -> None:
    base, experts = states(n_experts)
    setting: dict[str, Any] = {"scale": 0.2, "keep": 0.3, "subspace": 3, "steps": 12, "learning_rate": 1e-2}
    found, wanted = dict(doge(base, experts, **setting)), slow_doge(base, experts, **setting)
    assert set(found) == set(base) and found["count"] == 3
    for name in base:
        assert torch.allclose(found[name], wanted[name], atol=1e-9), name
    assert not torch.allclose(found[MATRICES[0]], base[MATRICES[0]], atol=1e-4)


def test_the_projection_matters() -> None:
    """A subspace of no direction (rank below `subspace`) leaves the gradient as it is."""
    base, experts = states()
    free = dict(doge(base, experts, subspace=99, steps=5, learning_rate=1e-2))
    bound = dict(doge(base, experts, subspace=2, steps=5, learning_rate=1e-2))
    assert not torch.allclose(free[MATRICES[0]], bound[MATRICES[0]], atol=1e-6)


def test_experts_change_places_freely_and_inputs_are_kept() -> None:
    base, experts = states()
    kept = copy.deepcopy((base, experts))
    first, other = (dict(doge(base, some, steps=5)) for some in (experts, experts[::-1]))
    assert all(torch.allclose(first[name], other[name], atol=1e-9) for name in SHAPES)
    for state, before in zip((base, *experts), (kept[0], *kept[1]), strict=True):
        assert all(torch.equal(state[name], before[name]) for name in state)


def test_degenerate_experts_give_finite_entries() -> None:
    base, experts = states(dtype=torch.float32)
    for some in ([base] * 3, [base, experts[0]], [experts[0]] * 3, experts[:1]):
        found = dict(doge(base, some, steps=3))
        assert all(torch.isfinite(found[name]).all() for name in SHAPES)
    found = dict(doge(base, [base] * 3, steps=3))
    assert all(torch.equal(found[name], base[name]) for name in base)


def test_an_expert_of_low_rank_adds_no_direction_of_its_null_space() -> None:
    base, experts = states(2, dtype=torch.float32)
    name = MATRICES[1]
    low = dict(experts[0])
    low[name] = base[name] + torch.outer(torch.linspace(-1, 1, 8), torch.linspace(1, 2, 14))
    nudged = dict(low)
    nudged[name] = low[name] * (1 + 2e-7)  # rounding: other noise in the null space
    one, other = (dict(doge(base, [given, experts[1]], steps=5, subspace=2)) for given in (low, nudged))
    assert torch.allclose(one[name], other[name], atol=1e-5)


def test_half_precision_computes_wide_and_rounds_once() -> None:
    base, experts = states(dtype=torch.bfloat16)
    wide = [{name: t.float() if t.is_floating_point() else t for name, t in s.items()} for s in (base, *experts)]
    found, wanted = dict(doge(base, experts, steps=5)), dict(doge(wide[0], wide[1:], steps=5))
    for name in SHAPES:
        assert torch.equal(found[name], wanted[name].bfloat16())


def test_what_is_refused() -> None:
    base, experts = states(9)
    with pytest.raises(ValueError, match=r"9 experts cannot share the rank of blocks.0.attn.in_proj_weight \[18, 8\]"):
        list(doge(base, experts))
    base, experts = states()
    experts[1]["ln.weight"][0] = math.nan
    with pytest.raises(ValueError, match=r"expert 1: ln\.weight holds NaN"):
        list(doge(base, experts, steps=1))
    for parameters, text in (
        ({"keep": 1.5}, r"keep=1\.5"),
        ({"scale": math.nan}, "scale=nan"),
        ({"steps": 0}, "steps=0"),
        ({"subspace": 0}, "subspace=0"),
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0"),
    ):
        with pytest.raises(ValueError, match=text):
            doge({}, [], **parameters)  # type: ignore[arg-type]
