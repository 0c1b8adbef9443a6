"""Models under test: from pixels to features, and the routing weights where there are any.

Shape letters: B batch, S input side, D feature width, G layer groups, K experts.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from bd_core.merged import MergedModel
from bd_core.router import Router
from pipeline.backbones.open_clip import Backbone


class Predictor(Protocol):
    """A model under test. `weights` is None where nothing is routed."""

    def features(self, pixels: Tensor, task: str) -> tuple[Tensor, Tensor | None]:
        """L2-normalised features [B, D] of uint8 [B, S, S, 3], and the routing weights [B, G, K]."""
        ...


@dataclass
class Static:
    """One image tower for every sample."""

    backbone: Backbone
    visual: nn.Module

    def features(self, pixels: Tensor, task: str) -> tuple[Tensor, Tensor | None]:
        """Features of the one tower."""
        return nn.functional.normalize(self.visual(self.backbone.normalise(pixels)), dim=-1), None


@dataclass
class Individual:
    """Each task's own expert: it must be told the task, so it is a reference and no merged model."""

    backbone: Backbone
    visuals: dict[str, nn.Module]

    def features(self, pixels: Tensor, task: str) -> tuple[Tensor, Tensor | None]:
        """Features of the task's expert."""
        return nn.functional.normalize(self.visuals[task](self.backbone.normalise(pixels)), dim=-1), None


@dataclass
class Corrected:
    """One image tower and Representation Surgery's correction for the task, which it must be told."""

    backbone: Backbone
    visual: nn.Module
    surgery: nn.Module

    def features(self, pixels: Tensor, task: str) -> tuple[Tensor, Tensor | None]:
        """Features as the task's expert would have them."""
        features = self.visual(self.backbone.normalise(pixels))
        return nn.functional.normalize(self.surgery(features, task), dim=-1), None


@dataclass
class Routed:
    """theta(x) = base + sum_k w_k(x) v_k; the router reads the pretrained backbone's tokens."""

    backbone: Backbone
    merged: MergedModel
    router: Router

    def features(self, pixels: Tensor, task: str) -> tuple[Tensor, Tensor | None]:
        """Features of the model merged for each sample."""
        features, weights, _ = self.with_pretrained(pixels)
        return features, weights

    def with_pretrained(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same two, and the pretrained backbone's features [B, D] that come with the router's tokens."""
        images = self.backbone.normalise(pixels)
        pretrained, tokens = self.backbone.tokens(images)
        weights = self.router(tokens)
        return nn.functional.normalize(self.merged(images, weights=weights), dim=-1), weights, pretrained


@torch.inference_mode()
def features_of(
    predictor: Predictor, pixels_BSS3: Tensor, task: str, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Features and weights of all `pixels`, batch by batch, on the CPU."""
    parts = [
        predictor.features(pixels_BSS3[start : start + batch_size].to(device), task)
        for start in range(0, len(pixels_BSS3), batch_size)
    ]
    weights = [weight.cpu() for _, weight in parts if weight is not None]
    return torch.cat([feature.cpu() for feature, _ in parts]), torch.cat(weights) if weights else None
