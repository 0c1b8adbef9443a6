"""TSV-M against the SVDs it is defined by."""

from __future__ import annotations

import pytest
import torch
from golden.read_golden import read_inputs
from golden_agreement import assert_agrees
from matrix_cases import MATRICES, apart, mean_steps, states, vectors
from torch import Tensor

from bd_core.methods.matrices import leading_part
from bd_core.methods.tsv_m import tsv_m


def slow_tsv_m(taus: list[Tensor]) -> Tensor:
    rank = min(taus[0].shape) // len(taus)
    parts = [torch.linalg.svd(tau, full_matrices=False) for tau in taus]
    u = torch.cat([part[0][:, :rank] for part in parts], 1)
    s = torch.cat([part[1][:rank] for part in parts])
    v = torch.cat([part[2][:rank].T for part in parts], 1)

    def orthogonal(bases: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(bases, full_matrices=False)
        keep = values > 1e-6  # directions that experts share, or lack, have no orthonormal pair
        return left[:, keep] @ right[keep]

    return orthogonal(u) @ torch.diag(s) @ orthogonal(v).T


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("n_experts", [1, 3, 4])
def test_tsv_m_is_its_definition(n_experts: int, dtype: torch.dtype, most: float) -> None:
    base, experts = states(n_experts, dtype=dtype)
    found = dict(tsv_m(base, experts, scale=0.7))
    for name in MATRICES:
        assert apart(found[name], base[name], 0.7 * slow_tsv_m(vectors(base, experts, name))) <= most, name
    for name, step in mean_steps(base, experts):
        assert apart(found[name], base[name], step) <= most, name


@pytest.mark.parametrize(("case", "n_experts"), [("fb_tsv_m", 4), ("fb_tsv_m_three", 3)])
def test_tsv_m_agrees_with_fusionbench(case: str, n_experts: int) -> None:
    inputs = read_inputs()
    assert_agrees(dict(tsv_m(inputs.base, inputs.experts[:n_experts])), case, inputs.base)


def test_one_expert_comes_back() -> None:
    base, experts = states(1, dtype=torch.float32)
    found = dict(tsv_m(base, experts))
    assert all(torch.allclose(found[name], experts[0][name], atol=1e-5) for name in experts[0])


def test_twins_and_strangers_to_the_matrix() -> None:
    """Two equal experts give one's leading part; an expert equal to the base takes nothing from the other's."""
    base, experts = states(2)
    for given in ([experts[0], experts[0]], [experts[0], base]):
        found = dict(tsv_m(base, given))
        for name in MATRICES:
            (tau,) = vectors(base, experts[:1], name)
            u, s, vh = torch.linalg.svd(tau, full_matrices=False)
            assert apart(found[name], base[name], (u[:, :6] * s[:6]) @ vh[:6]) <= 1e-6, name


def test_more_experts_than_rank_is_an_error_that_names_the_matrix() -> None:
    base, experts = states(13)
    with pytest.raises(ValueError, match=r"tsv_m: blocks\.0\.attn\.weight \[12, 12\] has rank 12 at most.*13 experts"):
        next(iter(tsv_m(base, experts)))
    with pytest.raises(ValueError, match="scale=inf"):
        tsv_m(base, experts, scale=float("inf"))


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(48, 48), (96, 48)])
def test_leading_part_is_the_best_approximation(shape: tuple[int, int], power: float) -> None:
    """From flat spectra to some that a Gram matrix in float32 cannot hold."""
    generator = torch.Generator().manual_seed(1)
    decay = torch.arange(1, 49) ** -power
    matrix = (torch.randn(shape[0], 48, generator=generator) * decay) @ torch.randn(48, shape[1], generator=generator)
    left, core, right = leading_part(matrix[None], 12)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    wanted = (u[:, :12] * s[:12]) @ vh[:12]
    assert float((left[0] @ core[0].double() @ right[0].T - wanted).norm() / wanted.norm()) <= 1e-5
    for basis in (left[0], right[0]):
        assert torch.allclose(basis.T @ basis, torch.eye(12).double(), atol=1e-5)
