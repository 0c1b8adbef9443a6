"""Batched per-sample forms of linear and embedding layers and of affine normalisations.

Legend: B batch, T tokens, D width, K experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
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
        dtype = x.dtype
        y = F.layer_norm(x.float() if self.fp32 else x, self.normalized_shape, None, None, self.eps)
        between = (1,) * (x.ndim - 1 - len(self.normalized_shape))
        scale = None if self.merged_weight is None else self.merged_weight()
        shift = None if self.merged_bias is None else self.merged_bias()
        return _affine(y, scale, shift, between, self.normalized_shape).to(dtype)


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
        scale = None if self.merged_weight is None else self.merged_weight()
        shift = None if self.merged_bias is None else self.merged_bias()
        return _affine(y, scale, shift, (), (x.shape[1], *(1,) * (x.ndim - 2)))


def _affine(
    y: Tensor, scale: Tensor | None, shift: Tensor | None, between: tuple[int, ...], own: tuple[int, ...]
) -> Tensor:
    scale = None if scale is None else scale.view(-1, *between, *own)
    shift = None if shift is None else shift.view(-1, *between, *own)
    if scale is None:
        return y if shift is None else y + shift
    return y * scale if shift is None else torch.addcmul(shift, y, scale)


def _tokens(x: Tensor) -> Tensor:
    """[B, ..., I] as [B, T, I]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])
