"""Per-sample forms of open_clip's modules that use plain parameters: the vision transformer, attention pooling.

Found by its attributes: bd_core does not import open_clip. Legend: B batch, T tokens, D width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bd_core.merged.tensors import MergedTensor

__all__ = ["MergedAttentionPool", "MergedVisionTransformer", "is_attention_pool", "is_vision_transformer"]


def is_vision_transformer(module: nn.Module) -> bool:
    """Whether this is open_clip's VisionTransformer (or one with the same parts)."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    parts = ("conv1", "patch_dropout", "ln_pre", "transformer", "_pool")
    return {"class_embedding", "positional_embedding"} <= own and all(hasattr(module, part) for part in parts)


class MergedVisionTransformer(nn.Module):
    """open_clip's VisionTransformer, its submodules already merged; the forward pass is open_clip's (3.3)."""

    tower: Any

    def __init__(self, tower: nn.Module, tensors: dict[str, MergedTensor]) -> None:
        super().__init__()
        self.tower = tower
        self.class_embedding = tensors["class_embedding"]
        self.positional_embedding = tensors["positional_embedding"]
        self.proj = tensors.get("proj")

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Image features [B, O], and the tokens if the tower was set to give them."""
        tower = self.tower
        patches = tower.conv1(images).flatten(2).mT
        class_B1D = self.class_embedding()[:, None].to(patches.dtype)
        x_BTD = torch.cat([class_B1D, patches], dim=1) + self.positional_embedding().to(patches.dtype)
        x_BTD = tower.transformer(tower.ln_pre(tower.patch_dropout(x_BTD)))
        pooled, tokens = tower._pool(x_BTD)
        if self.proj is not None:
            pooled = self._projected(pooled)
        return (pooled, tokens) if tower.output_tokens else pooled

    def _projected(self, pooled: Tensor) -> Tensor:
        assert self.proj is not None
        pooled_BTD = pooled.reshape(len(pooled), -1, pooled.shape[-1])
        return self.proj.project(pooled_BTD).reshape(*pooled.shape[:-1], -1)


def is_attention_pool(module: nn.Module) -> bool:
    """Whether this is the AttentionPool2d of CLIP's ResNets."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    children = {name for name, _ in module.named_children()}
    is_one = type(module).__name__ == "AttentionPool2d" and hasattr(module, "num_heads")
    return is_one and own == {"positional_embedding"} and children == {"q_proj", "k_proj", "v_proj", "c_proj"}


class MergedAttentionPool(nn.Module):
    """AttentionPool2d, its projections already merged: the mean token attends to all, and only it comes out."""

    pool: Any

    def __init__(self, pool: nn.Module, positional_embedding: MergedTensor) -> None:
        super().__init__()
        self.pool = pool
        self.positional_embedding = positional_embedding

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features [B, O] of a picture [B, D, H, W]."""
        tokens = x.flatten(2).mT
        x_BTD = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.positional_embedding().to(x.dtype)
        q, k, v = self.pool.q_proj(x_BTD[:, :1]), self.pool.k_proj(x_BTD), self.pool.v_proj(x_BTD)
        heads = (part.unflatten(2, (self.pool.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        y_BTD = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        pooled: Tensor = self.pool.c_proj(y_BTD)[:, 0]
        return pooled
