"""The routing weights of the forward pass under way, which every layer of a merged model shares.

Legend: B batch, C shared copies, G layer groups, K experts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["NoBatchedForm", "Routing", "shared_copies"]


class NoBatchedForm(Exception):
    """A module, or the way it was called, has no batched per-sample form; the message says why."""


class Routing:
    """Holder of the weights [B, G, K] of the forward pass under way; None between passes.

    Every linear layer keeps its working memory within `budget_bytes`. With `copies`, the samples stand in order of the
    merged copy they share, and `copies[c]` is the slice of copy c.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.weights_BGK: Tensor | None = None
        self.copies: tuple[slice, ...] = ()
        self._each: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def begin(self, weights_BGK: Float[Tensor, "B G K"], copies: tuple[slice, ...] = ()) -> None:
        """Weights for the pass that starts now."""
        self.weights_BGK = weights_BGK
        self.copies = copies
        self._each = {}

    def end(self) -> None:
        """Forget them, and the graph that hangs on them."""
        self.weights_BGK = None
        self.copies = ()
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


def shared_copies(weights_BGK: Float[Tensor, "B G K"], max_distance: float) -> list[list[int]]:
    """Samples that may share one merged copy: each within `max_distance` of the first sample of its list (ours).

    The distance is the largest over layer groups of sum_k |w_bk - w_ck|, so that a parameter moves by no more than
    that times the largest task vector's norm. Greedy, in the order of the batch.
    """
    apart_BB = torch.stack([(weights_BGK - one_GK).abs().sum(2).amax(1) for one_GK in weights_BGK.detach()])
    near = (apart_BB <= max_distance).tolist()
    left = list(range(len(near)))
    copies = []
    while left:
        first = left[0]
        copies.append([b for b in left if near[first][b]])
        left = [b for b in left if not near[first][b]]
    return copies
