"""Exact per-sample linear maps: merged weights are formed tile by tile, used while in cache, and dropped.

Legend: B batch, T tokens, I inputs, O outputs, R rows of a tile (of O), S samples of a tile (of B), K experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

__all__ = ["merged_linear", "tiles"]

# A merged tile must still be in cache when the product reads it. Measured with infra/bench/bench_merged.py.
TILE_BYTES = 2 << 20
MAX_SAMPLES = 16


def merged_linear(
    x_BTI: Float[Tensor, "B T I"],
    weights_BK: Float[Tensor, "B K"],
    base_OI: Float[Tensor, "O I"],
    vectors_KOI: Float[Tensor, "K O I"],
    bias_BO: Float[Tensor, "B O"] | None = None,
) -> Float[Tensor, "B T O"]:
    """Each sample's tokens through its own matrix: y_b = x_b (W_0 + sum_k w_bk tau_k)^T + bias_b.

    Differentiable in x, the weights and the bias, never in base or vectors. Peak memory beyond the output is one tile;
    nothing of size batch x parameters is kept for backward, which forms the tiles anew.
    """
    if x_BTI.shape[1] == 1:
        return _stacked(x_BTI, weights_BK, base_OI, vectors_KOI, bias_BO)
    result: Tensor = _TiledLinear.apply(x_BTI, weights_BK, base_OI, vectors_KOI, bias_BO)  # type: ignore[no-untyped-call]
    return result


def tiles(n_samples: int, n_rows: int, row_bytes: int) -> Iterator[tuple[slice, slice]]:
    """(rows, samples) blocks that cover all rows of all samples; samples run fastest, so vectors are read once."""
    n_samples_tile = min(n_samples, MAX_SAMPLES)
    n_rows_tile = max(1, min(n_rows, TILE_BYTES // max(1, n_samples_tile * row_bytes)))
    for row in range(0, n_rows, n_rows_tile):
        for sample in range(0, n_samples, n_samples_tile):
            yield slice(row, min(row + n_rows_tile, n_rows)), slice(sample, min(sample + n_samples_tile, n_samples))


def form_tile(weights_SK: Tensor, base_RI: Tensor, vectors_KRI: Tensor) -> Tensor:
    """Merged rows [S, R, ...] of the samples: one matrix product of weights by flattened task-vector rows."""
    flat = torch.addmm(base_RI.reshape(1, -1), weights_SK, vectors_KRI.flatten(1))
    return flat.view(len(weights_SK), *base_RI.shape)


def _stacked(x_BTI: Tensor, weights_BK: Tensor, base_OI: Tensor, vectors_KOI: Tensor, bias_BO: Tensor | None) -> Tensor:
    """The same with one token a sample: K + 1 products cost less than forming a matrix used once."""
    n_experts, n_outputs, n_inputs = vectors_KOI.shape
    x_BI = x_BTI[:, 0]
    each_BKO = (x_BI @ vectors_KOI.reshape(n_experts * n_outputs, n_inputs).T).view(-1, n_experts, n_outputs)
    y_BO = torch.baddbmm((x_BI @ base_OI.T)[:, None], weights_BK[:, None], each_BKO)[:, 0]
    return (y_BO if bias_BO is None else y_BO + bias_BO)[:, None]


class _TiledLinear(torch.autograd.Function):
    """y_b = x_b W_b^T + bias_b with W_b = W_0 + sum_k w_bk tau_k.

    dx_b = dy_b W_b;  dw_bk = <dy_b^T x_b, tau_k>;  dbias_b = sum_t dy_bt.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_BTI: Tensor,
        weights_BK: Tensor,
        base_OI: Tensor,
        vectors_KOI: Tensor,
        bias_BO: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_BTI, weights_BK, base_OI, vectors_KOI)
        y_BTO = x_BTI.new_empty(*x_BTI.shape[:2], len(base_OI))
        for rows, samples in tiles(len(x_BTI), len(base_OI), base_OI.shape[1] * base_OI.element_size()):
            tile_SRI = form_tile(weights_BK[samples], base_OI[rows], vectors_KOI[:, rows])
            if bias_BO is None:
                y_BTO[samples, :, rows] = torch.bmm(x_BTI[samples], tile_SRI.mT)
            else:
                y_BTO[samples, :, rows] = torch.baddbmm(bias_BO[samples, None, rows], x_BTI[samples], tile_SRI.mT)
        return y_BTO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, Tensor | None]:
        x_BTI, weights_BK, base_OI, vectors_KOI = ctx.saved_tensors
        needs_x, needs_weights, _, _, needs_bias = ctx.needs_input_grad
        dx_BTI = torch.zeros_like(x_BTI) if needs_x else None
        dweights_BK = torch.zeros_like(weights_BK) if needs_weights else None
        for rows, samples in tiles(len(x_BTI), len(base_OI), base_OI.shape[1] * base_OI.element_size()):
            dy_STR = dy_BTO[samples, :, rows]
            if dx_BTI is not None:
                dx_BTI[samples].baddbmm_(dy_STR, form_tile(weights_BK[samples], base_OI[rows], vectors_KOI[:, rows]))
            if dweights_BK is not None:
                dtile_SRI = torch.bmm(dy_STR.mT, x_BTI[samples])
                dweights_BK[samples].addmm_(dtile_SRI.flatten(1), vectors_KOI[:, rows].flatten(1).T)
        return dx_BTI, dweights_BK, None, None, dy_BTO.sum(1) if needs_bias else None
