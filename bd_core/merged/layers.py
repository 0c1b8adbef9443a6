"""Batched per-sample forms of linear and embedding layers and of affine normalisations.

Legend: B batch, T tokens, D width, K experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bd_core.merged.parts import WeightAndBias
from bd_core.merged.tensors import MergedTensor

__all__ = ["MergedBatchNorm", "MergedEmbedding", "MergedGroupNorm", "MergedLayerNorm", "MergedLinear"]


class MergedLinear(WeightAndBias):
    """`nn.Linear` with each sample's own weight and bias; input [B, ..., I]."""

    merged_weight: MergedTensor

    def __init__(self, layer: nn.Linear, weight: MergedTensor, bias: MergedTensor | None) -> None:
        super().__init__(weight, bias)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [B, ..., O]."""
        self.check(x)
        bias_BO = None if self.merged_bias is None else self.merged_bias()
        y_BTO = self.merged_weight.linear(_tokens(x), bias_BO)
        return y_BTO.reshape(*x.shape[:-1], y_BTO.shape[-1])


class MergedEmbedding(nn.Module):
    """`nn.Embedding` with each sample's own table; ids [B, ...], or [1, ...] shared by all samples.

    `padding_idx` freezes a row in training; the routing weights move that row too, so their gradient counts it.
    """

    def __init__(self, layer: nn.Embedding, weight: MergedTensor) -> None:
        super().__init__()
        self.merged_weight = weight

    @property
    def weight(self) -> Tensor:
        """The base's table."""
        return self.merged_weight.base

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of theta_0 + sum_k w_bk tau_k, [B, ..., D]; only the rows asked for are ever merged."""
        if ids.shape[0] != 1:  # position ids come as one row for all samples
            self.merged_weight.routing.check_batch(ids, self.merged_weight.name)
        return self.merged_weight.lookup(ids)


class MergedLayerNorm(WeightAndBias):
    """`nn.LayerNorm` with each sample's own affine part.

    `fp32` computes in float32 and casts back, as open_clip's LayerNormFp32 does.
    """

    def __init__(self, layer: nn.LayerNorm, weight: MergedTensor | None, bias: MergedTensor | None, fp32: bool) -> None:
        super().__init__(weight, bias)
        self.normalized_shape, self.eps, self.fp32 = tuple(layer.normalized_shape), layer.eps, fp32

    def forward(self, x: Tensor) -> Tensor:
        """Normalised over the last dimensions, then each sample's scale and shift."""
        self.check(x)
        dtype, between = x.dtype, (1,) * (x.ndim - 1 - len(self.normalized_shape))
        x = x.float() if self.fp32 else x
        scale, shift = (
            None if part is None else part().view(-1, *between, *self.normalized_shape)
            for part in (self.merged_weight, self.merged_bias)
        )
        if scale is None or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            y = _affine(F.layer_norm(x, self.normalized_shape, None, None, self.eps), scale, shift)
        else:
            y = _ScaledNorm.apply(x, scale, shift, self.normalized_shape, self.eps)  # type: ignore[no-untyped-call]
        return y.to(dtype)


class _ScaledNorm(torch.autograd.Function):
    """Layer normalisation times scale plus shift; keeps its input only, as torch's own does.

    Composed of torch's operations it would keep the normalised input as well, and its result in the next layer.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor | None, normalized_shape: tuple[int, ...], eps: float
    ) -> Tensor:
        def makes_again(x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
            return _affine(F.layer_norm(x, normalized_shape, None, None, eps), scale, shift)

        y, mean, rstd = torch.native_layer_norm(x, normalized_shape, None, None, eps)
        ctx.save_for_backward(x, mean, rstd, scale, *(() if shift is None else (shift,)))
        ctx.normalized_shape, ctx.eps, ctx.makes_again = normalized_shape, eps, makes_again
        return _affine(y, scale, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale = ctx.saved_tensors[:4]
        needs_x, needs_scale, needs_shift = ctx.needs_input_grad[:3]
        own = ctx.normalized_shape
        dx = dscale = None
        if needs_x:
            dx = torch.ops.aten.native_layer_norm_backward(
                dy * scale, x, own, mean, rstd, None, None, [True, False, False]
            )[0]
        if needs_scale:
            dscale = (dy * F.layer_norm(x, own, None, None, ctx.eps)).sum_to_size(scale.shape)
        return dx, dscale, dy.sum_to_size(scale.shape) if needs_shift else None, None, None


class MergedBatchNorm(WeightAndBias):
    """`nn.BatchNorm*d` in evaluation, with each sample's own affine part and running statistics."""

    def __init__(
        self,
        layer: nn.modules.batchnorm._BatchNorm,
        weight: MergedTensor | None,
        bias: MergedTensor | None,
        mean: MergedTensor,
        variance: MergedTensor,
    ) -> None:
        super().__init__(weight, bias)
        self.merged_mean, self.merged_variance, self.eps = mean, variance, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        """(x - mean_b) / sqrt(variance_b + eps) * scale_b + shift_b per channel of [B, C, ...]."""
        self.merged_mean.routing.check_batch(x, self.merged_mean.name)
        scale_BC = torch.rsqrt(self.merged_variance() + self.eps)
        if self.merged_weight is not None:
            scale_BC = scale_BC * self.merged_weight()
        shift_BC = -self.merged_mean() * scale_BC
        if self.merged_bias is not None:
            shift_BC = shift_BC + self.merged_bias()
        after = (1,) * (x.ndim - 2)
        return torch.addcmul(shift_BC.view(*shift_BC.shape, *after), x, scale_BC.view(*scale_BC.shape, *after))


class MergedGroupNorm(WeightAndBias):
    """`nn.GroupNorm` with each sample's own affine part."""

    def __init__(self, layer: nn.GroupNorm, weight: MergedTensor | None, bias: MergedTensor | None) -> None:
        super().__init__(weight, bias)
        self.num_groups, self.eps = layer.num_groups, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalised over channel groups, then each sample's scale and shift per channel of [B, C, ...]."""
        self.check(x)
        y = F.group_norm(x, self.num_groups, None, None, self.eps)
        scale, shift = (
            None if part is None else part().view(-1, x.shape[1], *(1,) * (x.ndim - 2))
            for part in (self.merged_weight, self.merged_bias)
        )
        return _affine(y, scale, shift)


def _affine(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None:
        return y if shift is None else y + shift
    return y * scale if shift is None else torch.addcmul(shift, y, scale)


def _tokens(x: Tensor) -> Tensor:
    """[B, ..., I] as [B, T, I]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])
