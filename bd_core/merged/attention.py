"""Per-sample `nn.MultiheadAttention`.

Legend: B batch, T query tokens, S key tokens, E width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bd_core.merged.routing import NoBatchedForm
from bd_core.merged.tensors import MergedTensor

__all__ = ["MergedMultiheadAttention"]


class MergedMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` in evaluation, with each sample's own projections; same arguments, same outputs."""

    # nn.TransformerEncoderLayer reads these before it takes a fused path that would bypass the merged weights.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, layer: nn.MultiheadAttention, tensors: dict[str, MergedTensor]) -> None:
        super().__init__()
        if layer.bias_k is not None or layer.add_zero_attn:
            raise NoBatchedForm("MultiheadAttention with bias_k or add_zero_attn")
        self.embed_dim, self.num_heads, self.batch_first = layer.embed_dim, layer.num_heads, layer.batch_first
        self.tensors = nn.ModuleDict({name.replace(".", "_"): tensor for name, tensor in tensors.items()})
        self.has_one_projection = "in_proj_weight" in tensors

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output, and the attention weights if `need_weights`. `is_causal` is a hint that needs the mask."""
        if query.ndim != 3:
            raise NoBatchedForm(f"MultiheadAttention called without a batch: query of shape {list(query.shape)}")
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint and needs attn_mask as well, as in nn.MultiheadAttention")
        is_self = query is key and key is value
        if not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        self._tensor("out_proj_weight").routing.check_batch(query, "MultiheadAttention")
        self._tensor("out_proj_weight").routing.check_batch(key, "MultiheadAttention")
        q, k, v = (self._heads(x) for x in self._project(query, key, value, is_self))
        mask = _additive_mask(attn_mask, key_padding_mask, q)
        if need_weights:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            shares = (scores if mask is None else scores + mask).softmax(-1)
            y = shares @ v
        else:
            shares = None
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y_BTE = self._linear(y.transpose(1, 2).flatten(2), "out_proj_weight", "out_proj_bias", slice(None))
        if shares is not None and average_attn_weights:
            shares = shares.mean(1)
        return (y_BTE if self.batch_first else y_BTE.transpose(0, 1)), shares

    def _project(self, query: Tensor, key: Tensor, value: Tensor, is_self: bool) -> tuple[Tensor, ...]:
        if is_self and self.has_one_projection:
            return self._linear(query, "in_proj_weight", "in_proj_bias", slice(None)).chunk(3, dim=-1)
        outputs = []
        for i, (x, letter) in enumerate(zip((query, key, value), "qkv", strict=True)):
            rows = slice(i * self.embed_dim, (i + 1) * self.embed_dim)
            if self.has_one_projection:
                outputs.append(self._linear(x, "in_proj_weight", "in_proj_bias", rows))
            else:
                outputs.append(self._linear(x, f"{letter}_proj_weight", "in_proj_bias", slice(None), bias_rows=rows))
        return tuple(outputs)

    def _linear(self, x: Tensor, weight: str, bias: str, rows: slice, bias_rows: slice | None = None) -> Tensor:
        tensor = self._tensor(weight)
        bias_BO = self._tensor(bias)()[:, bias_rows or rows] if bias in self.tensors else None
        return tensor.linear(x, bias_BO, rows)

    def _tensor(self, name: str) -> MergedTensor:
        tensor = self.tensors[name]
        assert isinstance(tensor, MergedTensor)
        return tensor

    def _heads(self, x_BTE: Tensor) -> Tensor:
        return x_BTE.reshape(*x_BTE.shape[:2], self.num_heads, -1).transpose(1, 2)


def _additive_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """One additive mask that broadcasts to [B, H, T, S]; torch's boolean masks are True where attention is barred."""
    parts = []
    if attn_mask is not None:
        heads_apart = attn_mask.ndim == 3
        parts.append(_as_additive(attn_mask.view(*q.shape[:2], *attn_mask.shape[1:]) if heads_apart else attn_mask, q))
    if key_padding_mask is not None:
        parts.append(_as_additive(key_padding_mask[:, None, None, :], q))
    return None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _as_additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))
