"""Exact per-sample linear maps: merged weights are formed tile by tile, used while in cache, and dropped.

Legend: B batch, T tokens, I inputs, O outputs, R rows of a tile (of O), S samples of a tile (of B), K experts.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from bd_core.merged.cost import CPU, CUDA, Call, stacked_is_cheaper
from bd_core.merged.gpu import triton_fits
from bd_core.merged.kernel import kernel_backward, kernel_fits, kernel_forward
from bd_core.merged.origin import Origin, origin_of
from bd_core.merged.tiles import form_tile, tiles

__all__ = ["BUDGET_BYTES", "merged_linear"]

BUDGET_BYTES = 64 << 20  # working memory of one layer beyond inputs, parameters and output


def merged_linear(
    x_BTI: Float[Tensor, "B T I"],
    weights_BK: Float[Tensor, "B K"],
    base_OI: Float[Tensor, "O I"],
    vectors_KOI: Float[Tensor, "K O I"],
    bias_BO: Float[Tensor, "B O"] | None = None,
    budget_bytes: int = BUDGET_BYTES,
) -> Float[Tensor, "B T O"]:
    """Each sample's tokens through its own matrix: y_b = x_b (W_0 + sum_k w_bk tau_k)^T + bias_b.

    Differentiable in x, the weights and the bias, never in base or vectors. Of two forms the cheaper one (`cost.py`):
    tiles of merged weights, one a thread at a time, or K + 1 products of the activations, as many samples at a time as
    `budget_bytes` holds. Nothing of size batch x parameters is kept for backward, which forms the tiles anew. What x
    was computed from stands in for x where autograd keeps it anyway (`origin.py`).
    Under autocast x is cast as for any product, while tiles are merged in the parameters' dtype and rounded after.
    """
    costs = CUDA if x_BTI.is_cuda else CPU
    (n_samples, n_tokens, n_inputs), (n_experts, n_outputs, _) = x_BTI.shape, vectors_KOI.shape
    call = Call(n_samples, n_tokens, n_experts, n_outputs, n_inputs, base_OI.element_size())
    if vectors_KOI.dtype == base_OI.dtype and stacked_is_cheaper(call, costs):
        a_sample = n_tokens * n_experts * n_outputs * x_BTI.element_size()
        if a_sample <= budget_bytes:
            return _stacked(x_BTI, weights_BK, base_OI, vectors_KOI, bias_BO, max(1, budget_bytes // max(1, a_sample)))
    device = x_BTI.device.type
    if not torch.is_autocast_enabled(device):
        return _tiled(x_BTI, weights_BK, base_OI, vectors_KOI, bias_BO)
    with torch.autocast(device, enabled=False):
        return _tiled(x_BTI.to(torch.get_autocast_dtype(device)), weights_BK, base_OI, vectors_KOI, bias_BO)


def _tiled(x_BTI: Tensor, weights_BK: Tensor, base_OI: Tensor, vectors_KOI: Tensor, bias_BO: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling():
        y_BTO: Tensor = _operator(x_BTI, weights_BK, base_OI, vectors_KOI, bias_BO)
        return y_BTO
    origin = origin_of(x_BTI)
    result: Tensor = _TiledLinear.apply(x_BTI, weights_BK, base_OI, vectors_KOI, bias_BO, origin)  # type: ignore[no-untyped-call]
    return result


def _stacked(
    x_BTI: Tensor,
    weights_BK: Tensor,
    base_OI: Tensor,
    vectors_KOI: Tensor,
    bias_BO: Tensor | None,
    samples_at_a_time: int,
) -> Tensor:
    """x_b W_0^T + sum_k w_bk (x_b tau_k^T) + bias_b: no merged matrix is ever formed."""
    y_BTO = x_BTI @ base_OI.T
    parts = []
    batches = (torch.split(each, samples_at_a_time) for each in (x_BTI, y_BTO, weights_BK))
    for x_STI, y_STO, weights_SK in zip(*batches, strict=True):
        each_KNO = torch.matmul(x_STI.flatten(0, 1), vectors_KOI.mT)
        each_SKN = each_KNO.view(len(vectors_KOI), len(x_STI), -1).transpose(0, 1)
        parts.append(torch.baddbmm(y_STO.reshape(len(x_STI), 1, -1), weights_SK[:, None], each_SKN).view_as(y_STO))
    y_BTO = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y_BTO if bias_BO is None else y_BTO + bias_BO[:, None]


class _TiledLinear(torch.autograd.Function):
    """y_b = x_b W_b^T + bias_b with W_b = W_0 + sum_k w_bk tau_k."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTI: Tensor,
        weights_BK: Tensor,
        base_OI: Tensor,
        vectors_KOI: Tensor,
        bias_BO: Tensor | None,
        origin: Origin | None = None,
    ) -> Tensor:
        sources = (x_BTI,) if origin is None else origin.sources
        ctx.save_for_backward(weights_BK, base_OI, vectors_KOI, *sources)
        ctx.origin = origin and origin.without_sources()
        return _forward(x_BTI, weights_BK, base_OI, vectors_KOI, bias_BO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTO: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weights, _, _, needs_bias = ctx.needs_input_grad[:5]
        weights_BK, base_OI, vectors_KOI, *sources = ctx.saved_tensors
        x_BTI = sources[0] if ctx.origin is None else ctx.origin.again(*sources)
        dx_BTI, dweights_BK = _backward(x_BTI, weights_BK, base_OI, vectors_KOI, dy_BTO, needs_x, needs_weights)
        return dx_BTI, dweights_BK, None, None, dy_BTO.sum(1) if needs_bias else None, None


def _forward(x_BTI: Tensor, weights_BK: Tensor, base_OI: Tensor, vectors_KOI: Tensor, bias_BO: Tensor | None) -> Tensor:
    if kernel_fits(x_BTI, base_OI, vectors_KOI):
        return kernel_forward(x_BTI, weights_BK, base_OI, vectors_KOI, bias_BO)
    if triton_fits(x_BTI, base_OI, vectors_KOI):
        from bd_core.merged.triton_kernel import triton_forward

        return triton_forward(x_BTI, weights_BK, base_OI, vectors_KOI, bias_BO)
    y_BTO = x_BTI.new_empty(*x_BTI.shape[:2], len(base_OI))
    for rows, samples in tiles(len(x_BTI), len(base_OI), base_OI.shape[1] * base_OI.element_size()):
        tile_SIR = form_tile(weights_BK[samples], base_OI[rows], vectors_KOI[:, rows]).to(x_BTI.dtype).mT
        y_STR = y_BTO[samples, :, rows]
        if bias_BO is None:
            torch.bmm(x_BTI[samples], tile_SIR, out=y_STR)
        else:
            torch.baddbmm(bias_BO[samples, None, rows].to(x_BTI.dtype), x_BTI[samples], tile_SIR, out=y_STR)
    return y_BTO


def _backward(
    x_BTI: Tensor,
    weights_BK: Tensor,
    base_OI: Tensor,
    vectors_KOI: Tensor,
    dy_BTO: Tensor,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dx_b = dy_b W_b and dw_bk = <dy_b^T x_b, tau_k>, each if needed."""
    if kernel_fits(x_BTI, base_OI, vectors_KOI):
        return kernel_backward(x_BTI, weights_BK, base_OI, vectors_KOI, dy_BTO, needs_x, needs_weights)
    if triton_fits(x_BTI, base_OI, vectors_KOI):
        from bd_core.merged.triton_kernel import triton_backward

        return triton_backward(x_BTI, weights_BK, base_OI, vectors_KOI, dy_BTO, needs_x, needs_weights)
    dx_BTI = x_BTI.new_zeros(x_BTI.shape) if needs_x else None
    dweights_BK = torch.zeros_like(weights_BK) if needs_weights else None
    for rows, samples in tiles(len(x_BTI), len(base_OI), base_OI.shape[1] * base_OI.element_size()):
        dy_STR = dy_BTO[samples, :, rows]
        if dx_BTI is not None:
            tile_SRI = form_tile(weights_BK[samples], base_OI[rows], vectors_KOI[:, rows])
            dx_BTI[samples].baddbmm_(dy_STR, tile_SRI.to(x_BTI.dtype))
        if dweights_BK is not None:
            dtile_SRI = torch.bmm(dy_STR.mT, x_BTI[samples]).to(weights_BK.dtype)
            dweights_BK[samples].addmm_(dtile_SRI.flatten(1), vectors_KOI[:, rows].flatten(1).T.to(weights_BK.dtype))
    return dx_BTI, dweights_BK


# torch.compile sees the same two functions as operators: the compiled kernel reads memory that tracing does not have.


@torch.library.custom_op(
    "bd_core::merged_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weights, Tensor base, Tensor vectors, Tensor? bias) -> Tensor",
)
def _operator(
    x_BTI: Tensor, weights_BK: Tensor, base_OI: Tensor, vectors_KOI: Tensor, bias_BO: Tensor | None
) -> Tensor:
    return _forward(x_BTI, weights_BK, base_OI, vectors_KOI, bias_BO)


@_operator.register_fake
def _(x_BTI: Tensor, weights_BK: Tensor, base_OI: Tensor, vectors_KOI: Tensor, bias_BO: Tensor | None) -> Tensor:
    return x_BTI.new_empty(*x_BTI.shape[:2], len(base_OI))


@torch.library.custom_op(
    "bd_core::merged_linear_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor weights, Tensor base, Tensor vectors, Tensor dy) -> (Tensor, Tensor)",
)
def _operator_backward(
    x_BTI: Tensor, weights_BK: Tensor, base_OI: Tensor, vectors_KOI: Tensor, dy_BTO: Tensor
) -> tuple[Tensor, Tensor]:
    dx_BTI, dweights_BK = _backward(x_BTI, weights_BK, base_OI, vectors_KOI, dy_BTO, True, True)
    assert dx_BTI is not None and dweights_BK is not None
    return dx_BTI, dweights_BK


@_operator_backward.register_fake
def _(x_BTI: Tensor, weights_BK: Tensor, base_OI: Tensor, vectors_KOI: Tensor, dy_BTO: Tensor) -> tuple[Tensor, Tensor]:
    return x_BTI.new_empty(x_BTI.shape), weights_BK.new_empty(weights_BK.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _operator_gradients(ctx: Any, dy_BTO: Tensor) -> tuple[Tensor | None, ...]:
    dx_BTI, dweights_BK = _operator_backward(*ctx.saved_tensors, dy_BTO)
    return dx_BTI, dweights_BK, None, None, dy_BTO.sum(1) if ctx.needs_input_grad[4] else None


_operator.register_autograd(_operator_gradients, setup_context=_keep)
