"""The exact per-sample linear map against its definition: the compiled kernel and the tiles of plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd_core.merged import exact
from bd_core.merged.exact import merged_linear
from bd_core.merged.kernel import kernel_backward, kernel_fits, kernel_forward, kernel_name

SHAPES = [
    (1, 2, 1, 1, 1),
    (5, 7, 13, 9, 3),
    (4, 3, 8, 16, 8),
    (9, 17, 96, 40, 4),
    (67, 2, 20, 70, 2),
    (3, 50, 512, 33, 5),
    (2, 6, 200, 1024, 1),
]
needs_kernel = pytest.mark.skipif(kernel_name() == "torch", reason="this installation built no CPU kernel")


def operands(b: int, t: int, i: int, o: int, k: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(b + 10 * t + 100 * i + 1000 * o)
    shapes = [(b, t, i), (b, k), (o, i), (k, o, i), (b, o)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def definition(x: Tensor, w: Tensor, base: Tensor, vectors: Tensor, bias: Tensor) -> Tensor:
    """Sample by sample, in double precision."""
    x, w, base, vectors, bias = (t.double() for t in (x, w, base, vectors, bias))
    return torch.stack(
        [x[b] @ (base + sum(w[b, k] * vectors[k] for k in range(len(vectors)))).T + bias[b] for b in range(len(x))]
    )


def compare(shape: tuple[int, ...], tolerance: float, dtype: torch.dtype = torch.float32) -> None:
    x, w, base, vectors, bias = operands(*shape, dtype=dtype)
    probe = torch.linspace(-1, 1, shape[0] * shape[1] * shape[3]).view(shape[0], shape[1], shape[3])
    gradients = []
    for function in (merged_linear, definition):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_(), bias.clone().requires_grad_()]
        y = function(leaves[0], leaves[1], base, vectors, leaves[2])
        gradients.append([y, *torch.autograd.grad((y * probe).sum(), leaves)])
    for i, (found, wanted) in enumerate(zip(*gradients, strict=True)):
        found, wanted = found.detach().double(), wanted.detach().double()
        error = (found - wanted).norm() / wanted.norm().clamp_min(1e-12)
        # The weights' gradient sums whole matrices of mixed signs and loses digits in any order of summation.
        assert float(error) <= (20 * tolerance if i == 2 else tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_definition(shape: tuple[int, ...]) -> None:
    compare(shape, 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_the_kernel_too(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "kernel_fits", lambda *_: False)
    compare(shape, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    compare((5, 7, 13, 9, 3), 1e-9 if dtype == torch.float64 else 3e-2, dtype)


@settings(max_examples=25)
@given(b=st.integers(1, 70), t=st.integers(2, 9), i=st.integers(1, 80), o=st.integers(1, 80), k=st.integers(1, 9))
def test_any_shape(b: int, t: int, i: int, o: int, k: int) -> None:
    compare((b, t, i, o, k), 1e-5)


@needs_kernel
def test_a_sample_is_bitwise_the_same_in_any_batch_and_on_any_number_of_threads() -> None:
    x, w, base, vectors, bias = operands(70, 5, 100, 90, 3)
    together = merged_linear(x, w, base, vectors, bias)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(merged_linear(x, w, base, vectors, bias), together)
    finally:
        torch.set_num_threads(before)
    for b in (0, 63, 64, 69):
        for few in (1, 2, 3, 4):  # few samples take a way of their own
            some = slice(b, b + few)
            alone = merged_linear(x[some], w[some], base, vectors, bias[some])
            assert torch.equal(alone, together[some])


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_to_activations_is_bitwise_that_of_any_batch(dtype: torch.dtype) -> None:
    x, w, base, vectors, _ = operands(9, 13, 100, 90, 3)
    dy, vectors = torch.randn(9, 13, 90, generator=torch.Generator().manual_seed(0)), vectors.to(dtype)
    together, weights = kernel_backward(x, w, base, vectors, dy, True, True)
    for few in (1, 2, 3, 4, 5):
        dx, dw = kernel_backward(x[:few], w[:few], base, vectors, dy[:few], True, True)
        assert torch.equal(dx, together[:few])
        torch.testing.assert_close(dw, weights[:few], rtol=1e-4, atol=1e-3)


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_task_vectors_in_bfloat16_are_widened_as_they_are_read(shape: tuple[int, ...]) -> None:
    x, w, base, vectors, bias = operands(*shape)
    rounded = vectors.bfloat16()
    assert kernel_fits(x, base, rounded)
    found = []
    for held in (rounded, rounded.float()):
        y = kernel_forward(x, w, base, held, bias)
        found.append((y, *kernel_backward(x, w, base, held, y, True, True)))
    for mine, wanted in zip(*(each[:2] for each in found), strict=True):
        assert torch.equal(mine, wanted)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-5, atol=1e-5 * float(found[1][2].abs().max()))


@needs_kernel
def test_rows_of_a_larger_matrix() -> None:
    x, w, base, vectors, bias = operands(5, 4, 12, 30, 3)
    rows = slice(10, 20)
    part = merged_linear(x, w, base[rows], vectors[:, rows], bias[:, rows])
    assert torch.allclose(part, merged_linear(x, w, base, vectors, bias)[..., rows], rtol=1e-6, atol=1e-6)


def test_what_is_strided_runs_through_torch() -> None:
    x, w, base, vectors, bias = operands(5, 4, 12, 30, 3)
    wanted = merged_linear(x, w, base, vectors, bias)
    found = merged_linear(
        x.transpose(0, 1).contiguous().transpose(0, 1), w, base.T.contiguous().T, vectors.mT.contiguous().mT, bias
    )
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
