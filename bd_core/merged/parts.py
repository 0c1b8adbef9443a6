"""What the per-sample forms of layers share: the merged weight and bias in the place of the layer's own."""

from __future__ import annotations

from torch import Tensor, nn

from bd_core.merged.tensors import MergedTensor

__all__ = ["WeightAndBias"]


class WeightAndBias(nn.Module):
    """Holds a layer's weight and bias, each merged per sample or absent."""

    def __init__(self, weight: MergedTensor | None, bias: MergedTensor | None) -> None:
        super().__init__()
        self.merged_weight = weight
        self.merged_bias = bias

    @property
    def weight(self) -> Tensor | None:
        """The base's weight: models ask it for its dtype and device."""
        return None if self.merged_weight is None else self.merged_weight.base

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return None if self.merged_bias is None else self.merged_bias.base

    def check(self, x: Tensor) -> None:
        """Nothing; raises `NoBatchedForm` unless samples come first."""
        for part in (self.merged_weight, self.merged_bias):
            if part is not None:
                part.routing.check_batch(x, part.name)
