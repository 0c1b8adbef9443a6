"""Compares the GPU kernel with its definition; prints every case's name and, where it fails, the reason after it.

TRITON_INTERPRET=1 python triton_cases.py cpu     # in Triton's interpreter
python triton_cases.py cuda
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from bd_core.merged import exact

DEVICE = sys.argv[1]
# Relative error in Frobenius norm: a merged weight and a result are each rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def operands(b: int, t: int, i: int, o: int, k: int, dtype: torch.dtype = torch.float32) -> Operands:
    """Activations, routing weights, base, task vectors, bias."""
    generator = torch.Generator().manual_seed(b + 10 * t + 100 * i + 1000 * o)
    shapes = [(b, t, i), (b, k), (o, i), (k, o, i), (b, o)]
    return tuple(torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)  # type: ignore[return-value]


def definition(x: Tensor, w: Tensor, base: Tensor, vectors: Tensor, bias: Tensor | None) -> Tensor:
    """Sample by sample, in double precision."""
    x, w, base, vectors = (t.double() for t in (x, w, base, vectors))
    merged = [base + sum(w[b, k] * vectors[k] for k in range(len(vectors))) for b in range(len(x))]
    y = torch.stack([x[b] @ own.T for b, own in enumerate(merged)])
    return y if bias is None else y + bias.double()[:, None]


def compare(x: Tensor, w: Tensor, base: Tensor, vectors: Tensor, bias: Tensor | None) -> None:
    """Asserts that the output and the gradients to activations, weights and bias are the definition's."""
    probe = torch.linspace(-0.5, 1, x[..., 0].numel() * len(base), device=DEVICE).view(*x.shape[:2], -1).to(x.dtype)
    results = []
    for function in (exact._tiled, definition):
        leaves = [t.detach().clone().requires_grad_() for t in (x, w, bias) if t is not None]
        y = function(leaves[0], leaves[1], base, vectors, leaves[2] if bias is not None else None)
        results.append([y, *torch.autograd.grad(y, leaves, probe.to(y.dtype))])
    for name, found, wanted in zip(("y", "dx", "dweights", "dbias"), *results, strict=False):
        error = float((found.double() - wanted.double()).detach().norm() / wanted.double().detach().norm())
        assert error <= TOLERANCE[x.dtype], f"{name} differs by {error:.1e}"


def odd_shapes() -> None:
    for shape in [(1, 2, 1, 1, 1), (5, 7, 13, 9, 3), (9, 17, 96, 40, 4), (2, 33, 40, 65, 5), (3, 130, 17, 20, 2)]:
        compare(*operands(*shape))


def any_number_of_experts() -> None:
    for k in (*range(1, 10), 17):
        compare(*operands(3, 4, 20, 35, k))


def without_bias() -> None:
    compare(*operands(3, 4, 20, 35, 2)[:4], None)


def bfloat16() -> None:
    for shape in [(5, 7, 13, 9, 3), (9, 20, 30, 70, 9), (9, 50, 40, 70, 8), (5, 130, 40, 33, 2)]:
        compare(*operands(*shape, dtype=torch.bfloat16))


def float16() -> None:
    for shape in [(5, 7, 13, 9, 3), (9, 50, 40, 70, 8)]:
        compare(*operands(*shape, dtype=torch.float16))


def parameters_of_another_dtype() -> None:
    x, w, base, vectors, bias = operands(5, 20, 30, 40, 3)
    compare(x.bfloat16(), w, base, vectors, bias)
    compare(x, w, base.bfloat16(), vectors.bfloat16(), bias.bfloat16())


def transposed_matrices_and_rows_of_larger_ones() -> None:
    x, w, base, vectors, bias = operands(5, 6, 30, 40, 3)
    compare(x, w, base.T.contiguous().T, vectors.mT.contiguous().mT, bias)
    compare(x, w, base[10:33], vectors[:, 10:33], bias[:, 10:33])
    compare(x.transpose(0, 1).contiguous().transpose(0, 1), w.T.contiguous().T, base, vectors, bias[:1].expand(5, -1))


def a_sample_does_not_depend_on_its_batch() -> None:
    for dtype in (torch.float32, torch.float16):
        x, w, base, vectors, bias = operands(19, 9, 40, 50, 3, dtype)
        x.requires_grad_(), w.requires_grad_()
        y = exact._tiled(x, w, base, vectors, bias)
        dx, dw = torch.autograd.grad(y, (x, w), torch.ones_like(y))
        for b in (0, 7, 18):
            one = slice(b, b + 1)
            alone = exact._tiled(x[one], w[one], base, vectors, bias[one])
            dx_alone, dw_alone = torch.autograd.grad(alone, (x, w), torch.ones_like(alone))
            assert torch.equal(alone[0], y[b]) and torch.equal(dx_alone[b], dx[b])
            assert float((dw_alone[b] - dw[b]).norm() / dw[b].norm()) <= (1e-6 if dtype == torch.float32 else 1e-3)


def compiled() -> None:
    x, w, base, vectors, bias = operands(5, 20, 30, 40, 3)
    w.requires_grad_()
    function = torch.compile(exact.merged_linear, backend="aot_eager", fullgraph=True)
    results = []
    for run in (function, exact.merged_linear):
        y = run(x, w, base, vectors, bias)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), w)))
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)


CASES: list[Callable[[], None]] = [
    odd_shapes,
    any_number_of_experts,
    without_bias,
    bfloat16,
    float16,
    parameters_of_another_dtype,
    transposed_matrices_and_rows_of_larger_ones,
    a_sample_does_not_depend_on_its_batch,
    compiled,
]


def interpret() -> None:
    """Sends CPU tensors to the kernel, which Triton's interpreter then runs with numpy."""
    from triton.language import bfloat16 as bfloat16_type
    from triton.language import float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):  # type: ignore[no-untyped-def]
        # The interpreter keeps bfloat16 as bits, and its products take the bits for numbers.
        if a.dtype.scalar == bfloat16_type:
            a, b = (
                TensorHandle(_convert_float(t.data, t.dtype.scalar, float32, None).view("float32"), float32)
                for t in (a, b)
            )
        return dot(self, a, b, *rest)

    InterpreterBuilder.create_dot = create_dot
    exact.kernel_fits = lambda *_: False
    exact.triton_fits = lambda *_: True


if __name__ == "__main__":
    if DEVICE == "cpu":
        interpret()
    for case in CASES:
        try:
            case()
            sys.stdout.write(f"{case.__name__}\n")
        except Exception as error:  # noqa: BLE001 - the test of this case shows it
            sys.stdout.write(f"{case.__name__} {type(error).__name__}: {error}".replace("\n", " ") + "\n")
