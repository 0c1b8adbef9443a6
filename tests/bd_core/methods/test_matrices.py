"""The shared linear algebra where its shortcuts begin: wide Gram matrices, ill-conditioned polar factors, solves."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bd_core.methods.matrices import MIRRORED_COLUMNS, concurrently, gram, leading_part, polar, right_solve


@pytest.mark.parametrize("columns", [3, MIRRORED_COLUMNS, MIRRORED_COLUMNS + 3])
def test_gram_is_the_product(columns: int) -> None:
    matrix = torch.randn(2, 5, columns, generator=torch.Generator().manual_seed(0)).double()
    found = gram(matrix)
    assert torch.allclose(found, matrix.mT @ matrix, atol=1e-12) and torch.equal(found, found.mT)


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1e-4, 1e-7])
@pytest.mark.parametrize("rows", [12, 30])
def test_polar_of_any_condition(rows: int, smallest: float) -> None:
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(rows, 12, generator=generator).double())
    v, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator).double())
    values = torch.logspace(0, 0, 12).double()
    values[-1] = smallest
    found = polar(((u * values) @ v.T)[None], torch.float64)
    assert torch.allclose((found.left @ found.right)[0], u @ v.T, atol=1e-6 if smallest < 1e-4 else 1e-9)
    assert torch.allclose(found.values[0].sort().values, values.sort().values, atol=1e-8)


def test_polar_of_nothing_is_nothing() -> None:
    found = polar(torch.zeros(1, 6, 4), torch.float32)
    assert not (found.left @ found.right).any() and not found.values.any()


@settings(max_examples=25)
@given(rank=st.integers(0, 6), ridge=st.sampled_from([0.0, 1e-3]), seed=st.integers(0, 99))
def test_right_solve_is_the_pseudo_inverse(rank: int, ridge: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rank, 6, generator=generator).double()
    matrix, product = inputs.T @ inputs, torch.randn(3, rank, generator=generator).double() @ inputs
    found = right_solve(product[None], matrix[None], ridge)[0]
    wanted = product @ torch.linalg.pinv(matrix + ridge * torch.eye(6).double(), rtol=1e-12, hermitian=True)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("first_to_last", [1.5, 7.0, 15.0, 40.0])
@pytest.mark.parametrize("rows", [120, 400])
def test_the_leading_subspace_is_nearer_than_that_of_an_svd_in_float32(rows: int, first_to_last: float) -> None:
    draw = torch.Generator().manual_seed(0)
    columns, rank = 120, 15
    u, _ = torch.linalg.qr(torch.randn(rows, columns, generator=draw).double())
    v, _ = torch.linalg.qr(torch.randn(columns, columns, generator=draw).double())
    values = torch.arange(1, columns + 1).double() ** -(math.log(first_to_last) / math.log(rank))
    matrix = ((u * values) @ v.T).float()
    _, _, found = leading_part(matrix[None], rank)
    single, exact = (torch.linalg.svd(each, full_matrices=False).Vh[:rank].mT for each in (matrix, matrix.double()))

    def error(basis: torch.Tensor) -> float:
        return float(torch.linalg.matrix_norm(basis - exact @ (exact.mT @ basis), 2))

    assert error(found[0]) < error(single.double())


def test_leading_part_of_equal_singular_values() -> None:
    """The cut goes through a multiplicity: any basis is right, as long as the part has the right size."""
    basis, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    left, core, right = leading_part(basis[None], 3)
    part = left[0] @ core[0].double() @ right[0].T
    assert torch.allclose(torch.linalg.svdvals(part), torch.tensor([1.0] * 3 + [0.0] * 5).double(), atol=1e-5)


@pytest.fixture
def two_threads() -> Iterator[None]:
    given = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(given)


@pytest.mark.usefixtures("two_threads")
def test_work_beside_each_other_keeps_order_and_shares_the_threads_out() -> None:
    both_there = threading.Barrier(2)

    def work(item: int) -> tuple[int, int]:
        both_there.wait(timeout=20)  # one after the other, the first would never get on
        return torch.get_num_threads(), item

    assert list(concurrently(work, range(8))) == [(1, i) for i in range(8)]
    assert torch.get_num_threads() == 2
    assert torch.ones(3).sum() == 3


@pytest.mark.usefixtures("two_threads")
def test_an_error_beside_other_work_arrives() -> None:
    def fails(item: int) -> int:
        if item == 2:
            raise ValueError("layer 2 is singular")
        return item

    with pytest.raises(ValueError, match="layer 2 is singular"):
        list(concurrently(fails, range(5)))
    assert torch.get_num_threads() == 2
