"""Per-sample two-dimensional convolutions.

Legend: B batch, C input channels, O output channels, H W picture, P patches, S samples and R rows of a tile, K experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bd_core.merged.parts import WeightAndBias
from bd_core.merged.tensors import LowRankTensor, MergedTensor
from bd_core.merged.tiles import form_tile, tiles

__all__ = ["MergedConv2d"]

Pair = tuple[int, int]


class MergedConv2d(WeightAndBias):
    """`nn.Conv2d` with each sample's own kernel and bias; input [B, C, H, W].

    Kernels that tile the picture without overlap (a ViT's patches, 1x1) are a linear map of patches; the others one
    convolution with the samples as channel groups, kernels formed tile by tile.
    """

    merged_weight: MergedTensor

    def __init__(self, layer: nn.Conv2d, weight: MergedTensor, bias: MergedTensor | None) -> None:
        super().__init__(weight, bias)
        self.stride, self.dilation, self.groups = _pair(layer.stride), _pair(layer.dilation), layer.groups
        self.kernel_size = _pair(layer.kernel_size)
        # As nn.Conv2d: anything but plain zero padding is padded beforehand.
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            self.padding: Pair = (0, 0)
            self.beforehand: list[int] | None = list(layer._reversed_padding_repeated_twice)
        else:
            self.padding, self.beforehand = _pair(layer.padding), None
        self.padding_mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        self.is_patchwise = self.stride == self.kernel_size and self.groups == 1 and self.dilation == (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output [B, O, H', W']."""
        weight = self.merged_weight
        self.check(x)
        if self.beforehand is not None:
            x = F.pad(x, self.beforehand, mode=self.padding_mode)
        bias_BO = None if self.merged_bias is None else self.merged_bias()
        if self.is_patchwise:
            return self._patchwise(x, bias_BO)
        by_factors = isinstance(weight, LowRankTensor) and self.groups == 1
        y = self._factors(x, weight) if by_factors else self._tiled(x)
        return y if bias_BO is None else y + bias_BO[:, :, None, None]

    def _tiled(self, x: Tensor) -> Tensor:
        weight, device = self.merged_weight, x.device.type
        if torch.is_autocast_enabled(device):  # kernels are merged in their own dtype and rounded after
            with torch.autocast(device, enabled=False):
                return self._tiled(x.to(torch.get_autocast_dtype(device)))
        y: Tensor = _TiledConv2d.apply(  # type: ignore[no-untyped-call]
            x, weight.weights, weight.base, weight.vectors, self.stride, self.padding, self.dilation, self.groups
        )
        return y

    def _factors(self, x: Tensor, weight: MergedTensor) -> Tensor:
        """All right factors as kernels in one convolution, the left ones as a 1x1 convolution of its channels."""
        assert isinstance(weight, LowRankTensor)
        own = (self.stride, self.padding, self.dilation)
        inner = F.conv2d(x, weight.right.view(-1, *weight.base.shape[1:]), None, *own)
        inner = inner * weight.weights_BF[:, :, None, None]
        return F.conv2d(x, weight.base, None, *own) + F.conv2d(inner, weight.left.T[:, :, None, None])

    def _patchwise(self, x: Tensor, bias_BO: Tensor | None) -> Tensor:
        if self.padding != (0, 0):
            x = F.pad(x, [self.padding[1], self.padding[1], self.padding[0], self.padding[0]])
        height, width = self.kernel_size
        rows, columns = x.shape[2] // height, x.shape[3] // width
        x = x[:, :, : rows * height, : columns * width]  # the stride never reaches the rest
        patches = x.reshape(len(x), -1, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
        y_BPO = self.merged_weight.linear(patches.reshape(len(x), rows * columns, -1), bias_BO)
        return y_BPO.mT.reshape(len(x), -1, rows, columns)


class _TiledConv2d(torch.autograd.Function):
    """One grouped convolution a tile, samples as groups; backward forms the tiles anew."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights_BK: Tensor,
        base: Tensor,
        vectors: Tensor,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weights_BK, base, vectors)
        ctx.geometry = (stride, padding, dilation, groups)
        parts: dict[int, list[Tensor]] = {}
        for rows, samples in _conv_tiles(x, base, groups):
            kernel = form_tile(weights_BK[samples], base[rows], vectors[:, rows]).to(x.dtype)
            n_samples, n_rows = kernel.shape[:2]
            y = F.conv2d(
                x[samples].flatten(0, 1)[None],
                kernel.flatten(0, 1),
                None,
                stride,
                padding,
                dilation,
                n_samples * groups,
            )
            parts.setdefault(samples.start, []).append(y.view(n_samples, n_rows, *y.shape[2:]))
        return torch.cat([torch.cat(part, 1) for part in parts.values()])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights_BK, base, vectors = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        needs_x, needs_weights = ctx.needs_input_grad[:2]
        dx = torch.zeros_like(x) if needs_x else None
        dweights_BK = torch.zeros_like(weights_BK) if needs_weights else None
        for rows, samples in _conv_tiles(x, base, groups):
            kernel = form_tile(weights_BK[samples], base[rows], vectors[:, rows]).to(x.dtype)
            n_samples = len(kernel)
            dx_tile, dkernel, _ = torch.ops.aten.convolution_backward(
                dy[samples, rows].flatten(0, 1)[None],
                x[samples].flatten(0, 1)[None],
                kernel.flatten(0, 1),
                None,
                stride,
                padding,
                dilation,
                False,
                [0, 0],
                n_samples * groups,
                [needs_x, needs_weights, False],
            )
            if dx is not None:
                dx[samples] += dx_tile.view(n_samples, *x.shape[1:])
            if dweights_BK is not None:
                dkernel = dkernel.reshape(n_samples, -1).to(weights_BK.dtype)
                dweights_BK[samples].addmm_(dkernel, vectors[:, rows].flatten(1).T.to(weights_BK.dtype))
        return dx, dweights_BK, None, None, None, None, None, None


def _conv_tiles(x: Tensor, base: Tensor, groups: int) -> list[tuple[slice, slice]]:
    row_bytes = base[0].numel() * base.element_size()
    if groups == 1:
        return list(tiles(len(x), len(base), row_bytes))
    # Rows of a grouped kernel see their own channels only, so a tile takes all of them (they are small).
    return [(slice(0, len(base)), samples) for _, samples in tiles(len(x), 1, len(base) * row_bytes)]


def _pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
