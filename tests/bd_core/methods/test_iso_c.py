"""ISO-C against the SVD it is defined by."""

from __future__ import annotations

import pytest
import torch
from golden.read_golden import read_inputs
from golden_agreement import assert_agrees
from matrix_cases import MATRICES, apart, mean_steps, states, vectors
from torch import Tensor

from bd_core.methods.iso_c import iso_c


def slow_iso_c(taus: list[Tensor]) -> Tensor:
    total = torch.zeros_like(taus[0])
    for tau in taus:
        total += tau
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    return sum(float(s.mean()) * torch.outer(u[:, i], vh[i]) for i in range(len(s)))  # type: ignore[return-value]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("n_experts", [1, 4])
def test_iso_c_is_its_definition(n_experts: int, dtype: torch.dtype, most: float) -> None:
    base, experts = states(n_experts, dtype=dtype)
    found = dict(iso_c(base, experts, scale=0.7))
    for name in MATRICES:
        assert apart(found[name], base[name], 0.7 * slow_iso_c(vectors(base, experts, name))) <= most, name
    for name, step in mean_steps(base, experts):
        assert apart(found[name], base[name], step) <= most, name


def test_iso_c_agrees_with_fusionbench() -> None:
    inputs = read_inputs()
    assert_agrees(dict(iso_c(inputs.base, inputs.experts)), "fb_iso_c", inputs.base)


@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (17, 16), (16, 16)])
def test_ill_conditioned_sums_are_as_exact(shape: tuple[int, int]) -> None:
    """Singular values over five orders of magnitude: the Gram matrix alone would lose half of them."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(shape[0], 16, generator=generator).double())
    v, _ = torch.linalg.qr(torch.randn(shape[1], 16, generator=generator).double())
    base, expert = {"w": torch.zeros(shape)}, {"w": (u * torch.logspace(0, -3, 16)) @ v.T}
    found = dict(iso_c(base, [{"w": expert["w"].float()}]))["w"]
    assert apart(found, base["w"], slow_iso_c([expert["w"].float().double()])) <= 1e-4


def test_directions_no_expert_has_stay_zero() -> None:
    """Identical columns: an SVD's vectors of singular value 0 are arbitrary, and would get the mean's size."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 4), (6, 4)):
        tau = torch.randn(shape[0], 3, generator=generator)
        expert = {"w": torch.cat([tau, tau[:, :1]], 1)}
        step = dict(iso_c({"w": torch.zeros(shape)}, [expert]))["w"]
        assert torch.allclose(step[:, 0], step[:, 3], atol=1e-5)
        values = torch.linalg.svdvals(step)
        mean = torch.linalg.svdvals(expert["w"])[:3].mean()
        assert torch.allclose(values, torch.tensor([1.0, 1.0, 1.0, 0.0]) * mean, atol=1e-4)


def test_settings() -> None:
    base, experts = states()
    with pytest.raises(ValueError, match="iso_c: scale=nan must be finite"):
        iso_c(base, experts, scale=float("nan"))
    assert not torch.equal(
        dict(iso_c(base, experts, exclude=()))["token_embedding.weight"],
        dict(iso_c(base, experts))["token_embedding.weight"],
    )
