"""RegMean and LOT against their formulas written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix_cases import MATRICES, State, apart, mean_steps, states, vectors
from test_matrix_methods import grams
from torch import Tensor

from bd_core.methods.bmm import bmm
from bd_core.methods.lot import lot
from bd_core.methods.regmean import regmean

METHODS: dict[str, Any] = {"regmean": regmean, "lot": lot, "bmm": bmm}


def few_inputs(n_experts: int) -> State:
    """Gram matrices of two inputs an expert: their sum is singular."""
    generator = torch.Generator().manual_seed(2)
    widths = {name: grams(1)[name].shape[-1] for name in MATRICES}
    inputs = {name: torch.randn(n_experts, 2, width, generator=generator).double() for name, width in widths.items()}
    return {name: x.mT @ x / 2 for name, x in inputs.items()}


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_regmean_is_its_formula_on_the_weights_themselves(dtype: torch.dtype, most: float) -> None:
    base, experts = states(3, dtype=dtype)
    given = {name: gram.double() for name, gram in grams(3).items()}
    found = dict(regmean(base, experts, grams=given, diagonal_share=0.1))
    for name in MATRICES:
        shrunk = [0.9 * gram + 0.1 * torch.diag(gram.diagonal()) for gram in given[name]]
        upper = sum(expert[name].double() @ gram for expert, gram in zip(experts, shrunk, strict=True))
        wanted = upper @ torch.linalg.inv(sum(shrunk))
        assert apart(found[name], base[name], wanted - base[name].double()) <= most, name
    for name, step in mean_steps(base, experts):
        assert apart(found[name], base[name], step) <= most, name


def test_regmean_keeps_the_mean_where_no_input_was() -> None:
    base, experts = states(3)
    given = few_inputs(3)
    found = dict(regmean(base, experts, grams=given, diagonal_share=0.0))
    for name in MATRICES:
        values, basis = torch.linalg.eigh(given[name].sum(0))
        unused = basis[:, values < 1e-9]
        mean = torch.stack([expert[name] for expert in experts]).mean(0)
        assert unused.shape[1] >= 6 and torch.allclose(found[name] @ unused, mean @ unused, atol=1e-9)
    for name, tensor in regmean(base, [experts[0]] * 3, grams=given):
        assert torch.allclose(tensor.double(), experts[0][name].double(), atol=1e-9), name


@pytest.mark.parametrize("inputs", ["many", "few"])
def test_lot_is_its_formula_with_the_pseudo_inverse(inputs: str) -> None:
    base, experts = states(3)
    given = {"many": {name: gram.double() for name, gram in grams(3).items()}, "few": few_inputs(3)}[inputs]
    squares = torch.rand(3, 12, generator=torch.Generator().manual_seed(3)).double()
    squares[:, 4] = 0
    found = dict(lot(base, experts, grams=given, squares={"ln.weight": squares}))
    for name in MATRICES:
        total, upper = torch.zeros_like(given[name][0]), torch.zeros_like(base[name].T)
        for gram, tau in zip(given[name], vectors(base, experts, name), strict=True):
            total += gram
            upper += gram @ tau.T  # the paper's T_k is [in, out]
        wanted = (torch.linalg.pinv(total, rtol=1e-10, hermitian=True) @ upper).T
        assert apart(found[name], base[name], wanted) <= 1e-7, name
    moves = torch.stack(vectors(base, experts, "ln.weight"))
    for i in range(12):
        shares = squares[:, i].tolist() if i != 4 else [1.0] * 3  # no input: the mean
        wanted_move = sum(q * float(m) for q, m in zip(shares, moves[:, i], strict=True)) / sum(shares)
        assert float(found["ln.weight"][i] - base["ln.weight"][i]) == pytest.approx(wanted_move)
    rest = dict(mean_steps(base, experts))
    assert apart(found["ln.bias"], base["ln.bias"], rest["ln.bias"]) <= 1e-9


def test_lot_without_squares_averages_scales() -> None:
    base, experts = states(3)
    found = dict(lot(base, experts, grams=grams(3)))
    assert apart(found["ln.weight"], base["ln.weight"], dict(mean_steps(base, experts))["ln.weight"]) <= 1e-9
    with pytest.raises(ValueError, match=r"lot: the squares of ln.weight are \[2, 12\]"):
        dict(lot(base, experts, grams=grams(3), squares={"ln.weight": torch.ones(2, 12)}))


@pytest.mark.parametrize("method", METHODS)
def test_gram_matrices_that_do_not_fit(method: str) -> None:
    base, experts = states(3)
    name = MATRICES[0]

    def run(given: State) -> dict[str, Tensor]:
        return dict(METHODS[method](base, experts, grams=given))

    with pytest.raises(ValueError, match=rf"{method}: the Gram matrices of {name} are \[3, 4, 4\]"):
        run(grams(3) | {name: torch.zeros(3, 4, 4)})
    with pytest.raises(ValueError, match=rf"Gram matrices of {name} .* hold NaN"):
        run(grams(3) | {name: grams(3)[name] * torch.nan})
    with pytest.raises(ValueError, match=f"{method}: none of the 1 Gram matrices"):
        run({"nose": torch.zeros(3, 5, 5)})


def test_settings() -> None:
    base, experts = states()
    with pytest.raises(ValueError, match=r"regmean: diagonal_share=1.5 must lie in \[0, 1\]"):
        regmean(base, experts, grams=grams(3), diagonal_share=1.5)
