"""What an activation was computed from, where autograd keeps that anyway: a layer need not keep the activation too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Origin", "origin_of"]

# Without their result, with their input kept for their own backward. (ReLU, tanh and sigmoid keep their result, which
# then costs a layer nothing.)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"SiluBackward0": F.silu, "MishBackward0": F.mish}
SAME_ELEMENTS = frozenset({"ViewBackward0", "UnsafeViewBackward0"})


@dataclass(frozen=True)
class Origin:
    """A tensor of this shape as the function that gives it and the tensors it takes; these have no graph."""

    function: Callable[..., Tensor]
    sources: tuple[Tensor, ...]
    shape: torch.Size

    def again(self, *sources: Tensor) -> Tensor:
        """The tensor, bitwise, from its sources as autograd hands them back."""
        with torch.no_grad():
            return self.function(*sources).reshape(self.shape)

    def without_sources(self) -> Origin:
        """What may outlive the forward pass: the sources belong to `save_for_backward`."""
        return Origin(self.function, (), self.shape)


def origin_of(x: Tensor) -> Origin | None:
    """How x came about, if autograd keeps its sources and making it anew costs little beside a product; else None.

    So it is with activation functions whose derivative needs their input, with products of two tensors (QuickGELU),
    and with the merged layer normalisation, which gives its origin itself. None under saved-tensor hooks, too: what
    checkpointing or offloading took away must not be called back in the forward pass.
    """
    node: Any = x.grad_fn
    if node is None or x._version:  # written to since
        return None
    while node.name() in SAME_ELEMENTS:
        node = node.next_functions[0][0]
    name = node.name()
    if name == "GeluBackward0":
        kind = node._saved_approximate
        return _origin(lambda a: F.gelu(a, approximate=kind), (node._raw_saved_self,), x)
    if name in ACTIVATIONS:
        return _origin(ACTIVATIONS[name], (node._raw_saved_self,), x)
    if name == "MulBackward0":
        return _origin(torch.mul, (node._raw_saved_self, node._raw_saved_other), x)
    function = getattr(node, "makes_again", None)
    return None if function is None else _origin(function, node._raw_saved_tensors, x)


def _origin(function: Callable[..., Tensor], kept: tuple[Any, ...], x: Tensor) -> Origin | None:
    if any(each.unpack_hook is not None or each.data is None for each in kept):
        return None
    return Origin(function, tuple(each.data.detach() for each in kept), x.shape)
