"""One parameter of a merged model, and what layers do with it: dense task vectors, or factors of them.

Legend: B batch, T tokens, I inputs, O outputs, K experts, R rank, F = K R.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bd_core.merged.exact import merged_linear
from bd_core.merged.low_rank import low_rank_linear
from bd_core.merged.routing import Routing
from bd_core.merged.tiles import form_tile, tiles

__all__ = ["LowRankTensor", "MergedTensor"]

ALL = slice(None)


class MergedTensor(nn.Module):
    """One parameter of the model, base and task vectors; called, it gives the parameter of every sample.

    Task vectors may be held in a smaller dtype than the base: they are widened tile by tile.

    The buffers are not persistent: a state dict of something that holds a merged model must not hold its experts.
    """

    base: Tensor
    vectors: Tensor

    def __init__(
        self, name: str, base: Float[Tensor, ...], vectors: Float[Tensor, "K ..."], group: int, routing: Routing
    ) -> None:
        super().__init__()
        self.name, self.group, self.routing = name, group, routing
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("vectors", vectors, persistent=False)

    @property
    def weights(self) -> Float[Tensor, "B K"]:
        """This parameter's routing weights, in its own dtype."""
        return self.routing.of(self.group, self.base.dtype)

    @property
    def vectors_bytes(self) -> int:
        """Memory that this parameter's K task vectors take."""
        return sum(b.numel() * b.element_size() for name, b in self.named_buffers() if name != "base")

    def forward(self) -> Float[Tensor, "B ..."]:
        """theta_0 + sum_k w_bk tau_k, one copy a sample: for parameters no larger than an activation."""
        if torch.is_autocast_enabled(self.base.device.type):  # a parameter is not rounded before it is used
            with torch.autocast(self.base.device.type, enabled=False):
                return self.forward()
        flat = self.base.reshape(1, -1).addmm(
            self.weights, self.vectors.reshape(len(self.vectors), -1).to(self.base.dtype)
        )
        return flat.reshape(-1, *self.base.shape)

    def of_sample(self, weights_K: Float[Tensor, " K"]) -> Float[Tensor, ...]:
        """theta_0 + sum_k w_k tau_k for one sample's weights."""
        vectors = self.vectors.to(self.base.dtype)  # factors are expanded at each access
        step: Tensor = torch.tensordot(weights_K.to(vectors.dtype), vectors, dims=1)
        return self.base + step

    def linear(
        self, x_BTI: Float[Tensor, "B T I"], bias_BO: Float[Tensor, "B O"] | None = None, rows: slice = ALL
    ) -> Float[Tensor, "B T O"]:
        """x_b W_b^T + bias_b, with those rows of the parameter (kernels flattened to a matrix)."""
        base_OI, vectors_KOI = self.base.flatten(1)[rows], self.vectors.flatten(2)[:, rows]
        at_once = self.routing.budget_bytes // max(1, base_OI.numel() * base_OI.element_size())
        if self.routing.copies and at_once:
            return _linear_of_copies(x_BTI, self.weights, self.routing.copies, base_OI, vectors_KOI, bias_BO, at_once)
        return merged_linear(x_BTI, self.weights, base_OI, vectors_KOI, bias_BO, self.routing.budget_bytes)

    def project(self, x_BTI: Float[Tensor, "B T I"]) -> Float[Tensor, "B T O"]:
        """x_b W_b, for a parameter stored [I, O]."""
        return merged_linear(x_BTI, self.weights, self.base.mT, self.vectors.mT, budget_bytes=self.routing.budget_bytes)

    def lookup(self, ids: Int[Tensor, ...]) -> Float[Tensor, ...]:
        """Rows of the parameter [B, ..., D]; only the rows asked for are merged."""
        weights_BK = self.weights
        shape = (len(weights_BK), *(1,) * ids.ndim)
        rows = F.embedding(ids, self.base)
        for k, vectors in enumerate(self.vectors):
            rows = rows + weights_BK[:, k].view(shape) * F.embedding(ids, vectors)
        return rows


class LowRankTensor(MergedTensor):
    """The same with task vectors as factors, tau_k = left_k right_k: they are multiplied by, never expanded.

    All K in one pair of products, x W_0^T + ((x right^T) * w) left^T with the factors stacked over K.
    """

    left: Tensor
    right: Tensor

    def __init__(
        self,
        name: str,
        base: Float[Tensor, ...],
        left_KOR: Float[Tensor, "K O R"],
        right_KRI: Float[Tensor, "K R I"],
        group: int,
        routing: Routing,
    ) -> None:
        nn.Module.__init__(self)
        self.name, self.group, self.routing, self.rank = name, group, routing, left_KOR.shape[2]
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("left", left_KOR.transpose(1, 2).flatten(0, 1).contiguous(), persistent=False)  # [F, O]
        self.register_buffer("right", right_KRI.flatten(0, 1).contiguous(), persistent=False)  # [F, I]

    @property
    def vectors(self) -> Float[Tensor, "K ..."]:  # type: ignore[override]
        """The task vectors, expanded: for what knows no factors."""
        left_KRO, right_KRI = (f.view(-1, self.rank, f.shape[1]) for f in (self.left, self.right))
        return torch.bmm(left_KRO.mT, right_KRI).reshape(-1, *self.base.shape)

    @property
    def weights_BF(self) -> Float[Tensor, "B F"]:
        """The routing weights, each as often as the rank."""
        return self.weights.repeat_interleave(self.rank, 1, output_size=len(self.left))

    def forward(self) -> Float[Tensor, "B ..."]:
        """theta_0 + sum_k w_bk left_k right_k, one copy a sample."""
        merged_BOI = (self.weights_BF[:, None] * self.left.T) @ self.right
        return self.base + merged_BOI.reshape(-1, *self.base.shape)

    def linear(
        self, x_BTI: Float[Tensor, "B T I"], bias_BO: Float[Tensor, "B O"] | None = None, rows: slice = ALL
    ) -> Float[Tensor, "B T O"]:
        """x_b W_b^T + bias_b, with those rows of the parameter."""
        base_OI = self.base.flatten(1)[rows]
        return low_rank_linear(x_BTI, self.weights_BF, base_OI.T, self.right, self.left[:, rows], bias_BO)

    def project(self, x_BTI: Float[Tensor, "B T I"]) -> Float[Tensor, "B T O"]:
        """x_b W_b, for a parameter stored [I, O]."""
        return low_rank_linear(x_BTI, self.weights_BF, self.base, self.left, self.right)

    def lookup(self, ids: Int[Tensor, ...]) -> Float[Tensor, ...]:
        """Rows of the parameter [B, ..., D]."""
        shape = (-1, *(1,) * (ids.ndim - 1), len(self.left))
        inner = self.weights_BF.view(shape) * F.embedding(ids, self.left.T)
        return F.embedding(ids, self.base) + inner @ self.right


def _linear_of_copies(
    x_BTI: Tensor,
    weights_BK: Tensor,
    copies: tuple[slice, ...],
    base_OI: Tensor,
    vectors_KOI: Tensor,
    bias_BO: Tensor | None,
    at_once: int,
) -> Tensor:
    """`at_once` copies' matrices in one product, so that task vectors are read once, then each on its own samples."""
    kind = x_BTI.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BTI.dtype
    x_BTI, bias_BO = x_BTI.to(dtype), None if bias_BO is None else bias_BO.to(dtype)
    y_BTO = x_BTI.new_empty(*x_BTI.shape[:2], len(base_OI))
    for some in (copies[start : start + at_once] for start in range(0, len(copies), at_once)):
        copies_COI = _formed(weights_BK[[part.start for part in some]], base_OI, vectors_KOI).to(dtype)
        for part, own_OI in zip(some, copies_COI, strict=True):
            rows_NI, out_NO = x_BTI[part].flatten(0, 1), y_BTO[part].flatten(0, 1)  # out: no gradients in this mode
            if bias_BO is None:
                torch.mm(rows_NI, own_OI.T, out=out_NO)
            else:
                torch.addmm(bias_BO[part.start], rows_NI, own_OI.T, out=out_NO)
    return y_BTO


def _formed(weights_CK: Tensor, base_OI: Tensor, vectors_KOI: Tensor) -> Tensor:
    """Whole merged matrices; task vectors of a smaller dtype are widened some rows at a time."""
    if vectors_KOI.dtype == base_OI.dtype:
        return form_tile(weights_CK, base_OI, vectors_KOI)
    copies_COI = base_OI.new_empty(len(weights_CK), *base_OI.shape)
    for rows, _ in tiles(1, len(base_OI), vectors_KOI[:, 0].numel() * base_OI.element_size()):
        copies_COI[:, rows] = form_tile(weights_CK, base_OI[rows], vectors_KOI[:, rows])
    return copies_COI
