"""The exact per-sample linear map on a GPU: merged tiles are formed on chip and multiplied at once.

    forward   y_b  = x_b W_b^T + bias_b,   W_b = W_0 + sum_k w_bk tau_k
    backward  dx_b = dy_b W_b,             dw_bk = <dy_b^T x_b, tau_k>

A program owns a block of samples: it reads each tile of W_0 and of the task vectors once for all of them, merges them
in one product [samples, experts] [experts, elements] whose sums are float32 (tensor cores: without them, merging costs
several times the product it is for), rounds to the activations' dtype and multiplies. Any strides, so that views (rows
of a matrix, transposed matrices) are read in place and nothing but the routing weights is copied; base and task vectors
may have a dtype of their own. Tile sizes do not depend on the batch and sums have a fixed order without atomics: y and
dx of a sample are bitwise the same whatever its batch, and all is the same from run to run.

Imported by `exact.py` where Triton is installed. Legend: B batch, T tokens, I inputs, O outputs, K experts, P programs
that share a gradient; inside a kernel the letters are those of its tiles, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

__all__ = ["triton_backward", "triton_forward"]


@dataclass(frozen=True)
class Blocks:
    """Sizes of a program's tiles, each a power of two, and its warps."""

    samples: int
    tokens: int
    outputs: int
    inputs: int
    warps: int


def _forward_blocks(n_tokens: int, n_padded: int, dtype: torch.dtype) -> Blocks:
    """Tiles of the forward kernel: by arithmetic and the compiler's counts, not yet measured on a GPU.

    At 8 warps the accumulators [S, T, O] take up to 128 of a thread's 255 registers, the merged tile [S, O, I] 32 to
    64, operands the rest; shared memory holds x [S, T, I] and the task vectors [K, O, I], 64 to 83 KB for 8 experts.
    Merging a tile takes about as long as multiplying it by 32 tokens, so tokens come in the blocks that waste least
    of both. float32 products run outside the tensor cores, their operands in registers: smaller tiles. More experts
    than the 16 that a product takes at once (`n_padded`) leave room for fewer outputs.
    """
    tokens = min((16, 32, 64), key=lambda size: (triton.cdiv(n_tokens, size) * (size + 32), size))
    if dtype == torch.float32:
        return Blocks(
            samples=min(8, 128 // tokens), tokens=tokens, outputs=max(16, 512 // n_padded), inputs=16, warps=4
        )
    return Blocks(samples=min(16, 512 // tokens), tokens=tokens, outputs=max(16, 1024 // n_padded), inputs=16, warps=8)


def _weights_blocks(dtype: torch.dtype) -> Blocks:
    """Tiles of the kernel for dw: dy^T x [S, O, I] takes 128 registers a thread as above; not yet measured on a GPU."""
    if dtype == torch.float32:
        return Blocks(samples=4, tokens=16, outputs=32, inputs=32, warps=4)
    return Blocks(samples=8, tokens=32, outputs=64, inputs=64, warps=8)


def triton_forward(
    x_BTI: Float[Tensor, "B T I"],
    weights_BK: Float[Tensor, "B K"],
    base_OI: Float[Tensor, "O I"],
    vectors_KOI: Float[Tensor, "K O I"],
    bias_BO: Float[Tensor, "B O"] | None,
) -> Float[Tensor, "B T O"]:
    """y_b = x_b W_b^T + bias_b in the dtype of x."""
    (n_samples, n_tokens, n_inputs), n_outputs = x_BTI.shape, len(base_OI)
    y_BTO = x_BTI.new_empty(n_samples, n_tokens, n_outputs)
    n_padded = max(16, triton.next_power_of_2(len(vectors_KOI)))  # a product sums 16 elements at least
    blocks = _forward_blocks(n_tokens, n_padded, x_BTI.dtype)
    sample_blocks = triton.cdiv(n_samples, blocks.samples)
    n_programs = sample_blocks * triton.cdiv(n_tokens, blocks.tokens) * triton.cdiv(n_outputs, blocks.outputs)
    # Whole blocks without edges, in the dtype of the vectors they are multiplied by.
    own = weights_BK.dtype if weights_BK.dtype == vectors_KOI.dtype else torch.float32
    padded_BK = weights_BK.new_zeros(sample_blocks * blocks.samples, n_padded, dtype=own)
    padded_BK[:n_samples, : len(vectors_KOI)] = weights_BK
    with torch.cuda.device_of(x_BTI):  # type: ignore[no-untyped-call]
        _forward[(n_programs,)](
            *(x_BTI, padded_BK, base_OI, vectors_KOI, x_BTI if bias_BO is None else bias_BO, y_BTO),
            *(n_samples, n_tokens, n_inputs, n_outputs),
            *(*x_BTI.stride(), *base_OI.stride(), *vectors_KOI.stride()),
            *((0, 0) if bias_BO is None else bias_BO.stride()),
            HAS_BIAS=bias_BO is not None,
            BY_ROWS=vectors_KOI.stride(2) <= vectors_KOI.stride(1),
            N_K=n_padded,
            **_options(blocks, vectors_KOI),
        )
    return y_BTO


def triton_backward(
    x_BTI: Float[Tensor, "B T I"],
    weights_BK: Float[Tensor, "B K"],
    base_OI: Float[Tensor, "O I"],
    vectors_KOI: Float[Tensor, "K O I"],
    dy_BTO: Float[Tensor, "B T O"],
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Float[Tensor, "B T I"] | None, Float[Tensor, "B K"] | None]:
    """dx_b = dy_b W_b and dw_bk = <dy_b^T x_b, tau_k>, each if needed; dx is the forward kernel, matrices transposed.

    Beyond the results, dw needs one float for every (tile of 64 x 64 parameters, sample, expert): B / 2048 of the bytes
    of the layer's task vectors in bfloat16.
    """
    dx_BTI = triton_forward(dy_BTO, weights_BK, base_OI.mT, vectors_KOI.mT, None) if needs_x else None
    return dx_BTI, _weights_gradient(x_BTI, weights_BK, vectors_KOI, dy_BTO) if needs_weights else None


def _weights_gradient(x_BTI: Tensor, weights_BK: Tensor, vectors_KOI: Tensor, dy_BTO: Tensor) -> Tensor:
    (n_samples, n_tokens, n_inputs), n_outputs = x_BTI.shape, dy_BTO.shape[2]
    blocks = _weights_blocks(x_BTI.dtype)
    n_parts = triton.cdiv(n_outputs, blocks.outputs) * triton.cdiv(n_inputs, blocks.inputs)
    parts_PBK = torch.empty(n_parts, *weights_BK.shape, dtype=torch.float32, device=x_BTI.device)
    with torch.cuda.device_of(x_BTI):  # type: ignore[no-untyped-call]
        _backward_weights[(n_parts * triton.cdiv(n_samples, blocks.samples),)](
            *(x_BTI, vectors_KOI, dy_BTO, parts_PBK),
            *(n_samples, n_tokens, n_inputs, n_outputs),
            *(*x_BTI.stride(), *vectors_KOI.stride(), *dy_BTO.stride()),
            **_options(blocks, vectors_KOI),
        )
    return parts_PBK.sum(0).to(weights_BK.dtype)


def _options(blocks: Blocks, vectors_KOI: Tensor) -> dict[str, Any]:
    """What both kernels are compiled for. float32 products are exact unless torch's own may use TF32."""
    return {
        "N_EXPERTS": len(vectors_KOI),
        "N_S": blocks.samples,
        "N_T": blocks.tokens,
        "N_O": blocks.outputs,
        "N_I": blocks.inputs,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "num_warps": blocks.warps,
        "num_stages": 2,
    }


@triton.jit
@no_type_check
def _forward(
    x_at,
    weights_at,
    base_at,
    vectors_at,
    bias_at,
    y_at,
    n_samples,
    n_tokens,
    n_inputs,
    n_outputs,
    x_b,
    x_t,
    x_i,
    base_o,
    base_i,
    vectors_k,
    vectors_o,
    vectors_i,
    bias_b,
    bias_o,
    HAS_BIAS: tl.constexpr,
    BY_ROWS: tl.constexpr,
    N_K: tl.constexpr,
    N_EXPERTS: tl.constexpr,
    N_S: tl.constexpr,
    N_T: tl.constexpr,
    N_O: tl.constexpr,
    N_I: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    # Samples run fastest, so that programs that run together share task-vector tiles in the L2 cache.
    sample_blocks, token_blocks = tl.cdiv(n_samples, N_S), tl.cdiv(n_tokens, N_T)
    program = tl.program_id(0)
    s_S = program % sample_blocks * N_S + tl.arange(0, N_S)
    t_T = program // sample_blocks % token_blocks * N_T + tl.arange(0, N_T)
    o_O = program // (sample_blocks * token_blocks) * N_O + tl.arange(0, N_O)
    s_S11, t_1T1, o_11O = s_S.to(tl.int64)[:, None, None], t_T[None, :, None], o_O[None, None, :]
    rows_ST1 = (s_S11 < n_samples) & (t_1T1 < n_tokens)
    x_rows = x_at + s_S11 * x_b + t_1T1 * x_t
    k_K = tl.arange(0, N_K)
    weights_SK = tl.load(weights_at + s_S[:, None] * N_K + k_K[None, :])
    # The elements of a tile in one row, [N_O, N_I] or, of transposed matrices, [N_I, N_O]: as they lie in memory.
    n_N = tl.arange(0, N_O * N_I)
    if BY_ROWS:
        o_N, i_N = program // (sample_blocks * token_blocks) * N_O + n_N // N_I, n_N % N_I
    else:
        o_N, i_N = program // (sample_blocks * token_blocks) * N_O + n_N % N_O, n_N // N_O
    vectors_KN = vectors_at + k_K.to(tl.int64)[:, None] * vectors_k + (o_N * vectors_o)[None, :]
    y_STO = tl.zeros((N_S, N_T, N_O), tl.float32)
    for first in range(0, n_inputs, N_I):
        inside_N = (o_N < n_outputs) & (first + i_N < n_inputs)
        base_N = tl.load(base_at + o_N * base_o + (first + i_N) * base_i, mask=inside_N, other=0.0)
        tile_KN = tl.load(
            vectors_KN + ((first + i_N) * vectors_i)[None, :],
            mask=(k_K < N_EXPERTS)[:, None] & inside_N[None, :],
            other=0.0,
        )
        merged_SN = tl.dot(weights_SK, tile_KN.to(weights_SK.dtype), input_precision="ieee")
        merged_SN += base_N.to(tl.float32)[None, :]
        if BY_ROWS:
            merged_SIO = tl.permute(tl.reshape(merged_SN, (N_S, N_O, N_I)), (0, 2, 1))
        else:
            merged_SIO = tl.reshape(merged_SN, (N_S, N_I, N_O))
        i_11I = (first + tl.arange(0, N_I))[None, None, :]
        x_STI = tl.load(x_rows + i_11I * x_i, mask=rows_ST1 & (i_11I < n_inputs), other=0.0)
        y_STO = tl.dot(x_STI, merged_SIO.to(x_STI.dtype), y_STO, input_precision=PRECISION)
    columns_S1O = (s_S11 < n_samples) & (o_11O < n_outputs)
    if HAS_BIAS:
        y_STO += tl.load(bias_at + s_S11 * bias_b + o_11O * bias_o, mask=columns_S1O, other=0.0).to(tl.float32)
    y_rows = y_at + (s_S11 * n_tokens + t_1T1) * n_outputs
    tl.store(y_rows + o_11O, y_STO.to(y_at.dtype.element_ty), mask=rows_ST1 & columns_S1O)


@triton.jit
@no_type_check
def _backward_weights(
    x_at,
    vectors_at,
    dy_at,
    parts_at,
    n_samples,
    n_tokens,
    n_inputs,
    n_outputs,
    x_b,
    x_t,
    x_i,
    vectors_k,
    vectors_o,
    vectors_i,
    dy_b,
    dy_t,
    dy_o,
    N_EXPERTS: tl.constexpr,
    N_S: tl.constexpr,
    N_T: tl.constexpr,
    N_O: tl.constexpr,
    N_I: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    sample_blocks, input_blocks = tl.cdiv(n_samples, N_S), tl.cdiv(n_inputs, N_I)
    program = tl.program_id(0)
    part = program // sample_blocks
    s_S = (program % sample_blocks * N_S + tl.arange(0, N_S)).to(tl.int64)
    i_I = part % input_blocks * N_I + tl.arange(0, N_I)
    o_O = part // input_blocks * N_O + tl.arange(0, N_O)
    s_S11, i_11I, o_1O1 = s_S[:, None, None], i_I[None, None, :], o_O[None, :, None]
    d_SOI = tl.zeros((N_S, N_O, N_I), tl.float32)
    for first in range(0, n_tokens, N_T):
        t_T = first + tl.arange(0, N_T)
        t_1T1, t_11T = t_T[None, :, None], t_T[None, None, :]
        x_STI = tl.load(
            x_at + s_S11 * x_b + t_1T1 * x_t + i_11I * x_i,
            mask=(s_S11 < n_samples) & (t_1T1 < n_tokens) & (i_11I < n_inputs),
            other=0.0,
        )
        dy_SOT = tl.load(
            dy_at + s_S11 * dy_b + t_11T * dy_t + o_1O1 * dy_o,
            mask=(s_S11 < n_samples) & (t_11T < n_tokens) & (o_1O1 < n_outputs),
            other=0.0,
        )
        d_SOI = tl.dot(dy_SOT, x_STI, d_SOI, input_precision=PRECISION)
    inside_OI = (o_O < n_outputs)[:, None] & (i_I < n_inputs)[None, :]
    vector_at = vectors_at + o_O[:, None] * vectors_o + i_I[None, :] * vectors_i
    part_at = parts_at + (part.to(tl.int64) * n_samples + s_S) * N_EXPERTS
    for _ in tl.static_range(N_EXPERTS):
        vector_OI = tl.load(vector_at, mask=inside_OI, other=0.0).to(tl.float32)
        tl.store(part_at, tl.sum(tl.sum(d_SOI * vector_OI[None], 2), 1), mask=s_S < n_samples)
        vector_at += vectors_k
        part_at += 1
