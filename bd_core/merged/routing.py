"""What every layer of a merged model shares: the routing weights of the forward pass under way.

Legend: B batch, G layer groups, K experts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["MergedTensor", "NoBatchedForm", "Routing"]


class NoBatchedForm(Exception):
    """A module, or the way it was called, has no batched per-sample form; the message says why."""


class Routing:
    """Holder of the weights [B, G, K] of the forward pass under way; None between passes."""

    def __init__(self) -> None:
        self.weights_BGK: Tensor | None = None
        self._each: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def begin(self, weights_BGK: Float[Tensor, "B G K"]) -> None:
        """Weights for the pass that starts now."""
        self.weights_BGK = weights_BGK
        self._each = {}

    def end(self) -> None:
        """Forget them, and the graph that hangs on them."""
        self.weights_BGK = None
        self._each = {}

    def of(self, group: int, dtype: torch.dtype) -> Float[Tensor, "B K"]:
        """The weights of one layer group."""
        assert self.weights_BGK is not None, "a layer of a merged model was called outside MergedModel.forward"
        if dtype not in self._each:
            # Split once for all layers: one node of the graph, and rows that lie together.
            self._each[dtype] = self.weights_BGK.to(dtype).transpose(0, 1).contiguous().unbind(0)
        return self._each[dtype][group]

    def check_batch(self, x: Tensor, where: str) -> None:
        """Nothing; raises `NoBatchedForm` unless the first dimension of x is the sample."""
        assert self.weights_BGK is not None
        if x.ndim == 0 or x.shape[0] != self.weights_BGK.shape[0]:
            raise NoBatchedForm(
                f"{where} is called with shape {list(x.shape)}, whose first dimension is not the batch of "
                f"{self.weights_BGK.shape[0]} samples"
            )


class MergedTensor(nn.Module):
    """One parameter of the model, base and task vectors; called, it gives the parameter of every sample.

    The buffers are not persistent: a state dict of something that holds a merged model must not hold its experts.
    """

    base: Tensor
    vectors: Tensor

    def __init__(
        self, name: str, base: Float[Tensor, ...], vectors: Float[Tensor, "K ..."], group: int, routing: Routing
    ) -> None:
        super().__init__()
        self.name = name
        self.group = group
        self.routing = routing
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("vectors", vectors, persistent=False)

    @property
    def weights(self) -> Float[Tensor, "B K"]:
        """This parameter's routing weights, in its own dtype."""
        return self.routing.of(self.group, self.base.dtype)

    def forward(self) -> Float[Tensor, "B ..."]:
        """theta_0 + sum_k w_bk tau_k, one copy a sample: for parameters no larger than an activation."""
        flat = self.base.reshape(1, -1).addmm(self.weights, self.vectors.reshape(len(self.vectors), -1))
        return flat.reshape(-1, *self.base.shape)
