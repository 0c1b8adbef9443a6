"""WUDI in steps against autograd on its loss, in closed form against the normal equations."""

from __future__ import annotations

import pytest
import torch
from golden.read_golden import read_inputs
from golden_agreement import differences
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_cases import MATRICES, REST, apart, states, vectors
from torch import Tensor

from bd_core.methods.stream import EMBEDDINGS
from bd_core.methods.wudi import wudi, wudi_exact


def loss(tau: Tensor, taus: list[Tensor]) -> Tensor:
    terms = [((tau - own) @ own.T).square().sum() / own.square().sum() for own in taus if bool(own.any())]
    return torch.stack(terms).sum()


def slow_wudi(taus: list[Tensor], steps: int, learning_rate: float) -> Tensor:
    tau = torch.stack(taus).sum(0).requires_grad_()
    optimiser = torch.optim.Adam([tau], lr=learning_rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(tau, taus).backward()
        optimiser.step()
    return tau.detach()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_wudi_is_adam_on_its_loss(dtype: torch.dtype, most: float) -> None:
    base, experts = states(3, dtype=dtype)
    found = dict(wudi(base, experts, steps=20, learning_rate=1e-3))
    for name in MATRICES:
        assert apart(found[name], base[name], slow_wudi(vectors(base, experts, name), 20, 1e-3)) <= most, name
    assert all(torch.equal(found[name], base[name]) for name in REST)


def test_wudi_agrees_with_fusionbench() -> None:
    """FusionBench takes every matrix but the table, and the mean where there is none; theta_0 stays there here."""
    inputs = read_inputs()
    found = differences(dict(wudi(inputs.base, inputs.experts, exclude=EMBEDDINGS)), "fb_wudi", inputs.base)
    compared = [name for name in found if inputs.base[name].ndim == 2 and "embedding" not in name]
    assert len(compared) == 7 and max(found[name] for name in compared) <= 1e-5


@settings(max_examples=25)
@given(n_experts=st.integers(1, 4), rows=st.integers(1, 7), columns=st.integers(1, 7), seed=st.integers(0, 99))
def test_wudi_exact_is_a_minimum(n_experts: int, rows: int, columns: int, seed: int) -> None:
    """No direction lowers the loss: its gradient is zero, also where fewer vectors than columns leave it flat."""
    generator = torch.Generator().manual_seed(seed)
    base = {"w": torch.zeros(rows, columns).double()}
    taus = [torch.randn(rows, columns, generator=generator).double() for _ in range(n_experts)]
    (step,) = [step.requires_grad_() for _, step in wudi_exact(base, [{"w": tau} for tau in taus], damping=0.0)]
    loss(step, taus).backward()
    assert step.grad is not None and float(step.grad.abs().max()) <= 1e-6 * (1 + float(step.detach().abs().max()))


# One expert has fewer rows than the widest matrix has columns, and square matrices that are nearly singular.
@pytest.mark.parametrize(
    ("n_experts", "dtype", "most"),
    [(3, torch.float64, 1e-8), (3, torch.float32, 1e-5), (1, torch.float64, 1e-8), (1, torch.float32, 1e-4)],
)
def test_wudi_exact_is_its_formula(n_experts: int, dtype: torch.dtype, most: float) -> None:
    base, experts = states(n_experts, dtype=dtype)
    found = dict(wudi_exact(base, experts, damping=1e-4))
    for name in MATRICES:
        taus = vectors(base, experts, name)
        grams = [tau.T @ tau / tau.square().sum() for tau in taus]
        product = sum(tau @ gram for tau, gram in zip(taus, grams, strict=True))
        ridge = 1e-4 * sum(grams).trace() / len(grams[0])  # type: ignore[union-attr]
        step = product @ torch.linalg.inv(sum(grams) + ridge * torch.eye(len(grams[0])).double())
        assert apart(found[name], base[name], step) <= most, name
    assert all(torch.equal(found[name], base[name]) for name in REST)


def test_a_zero_vector_has_no_say_and_one_expert_comes_back() -> None:
    base, experts = states(2)
    for function in (wudi, wudi_exact):
        one, with_base = dict(function(base, experts[:1])), dict(function(base, [experts[0], base]))
        for name in MATRICES:
            (tau,) = vectors(base, experts[:1], name)
            assert apart(with_base[name], base[name], one[name] - base[name]) <= 1e-9
            # A wide matrix alone leaves its loss flat in some directions, all of them zero in tau itself.
            assert apart(one[name], base[name], tau) <= 1e-2, name


def test_projections_and_heads_stay_unless_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ["visual.proj", "text_projection", "head.weight", "blocks.0.attn.out_proj.weight", "blocks.0.mlp.head_proj"]
    base = {name: torch.randn(4, 4, generator=generator) for name in names}
    experts = [{name: 1.1 * tensor for name, tensor in base.items()}]
    moved = [name for name, tensor in wudi_exact(base, experts) if not torch.equal(tensor, base[name])]
    assert moved == names[3:]
    assert all(not torch.equal(tensor, base[name]) for name, tensor in wudi_exact(base, experts, exclude=()))


def test_settings() -> None:
    base, experts = states()
    for function, setting, text in (
        (wudi, {"steps": 0}, "steps=0 must be at least 1"),
        (wudi, {"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        (wudi_exact, {"damping": 1.0}, r"damping=1.0 must lie in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=text):
            function(base, experts, **setting)  # type: ignore[operator]
