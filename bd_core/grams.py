"""What the linear weights of a running model are multiplied by: Gram matrices of their inputs, squares at the norms.

Legend: N rows (samples x tokens), I inputs of a weight, O its outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["InputMoments"]

ATEN = torch.ops.aten


class InputMoments(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects X^T X of every linear weight's inputs X while a model runs inside this context.

    Weights are known by their memory, not by their module: attention whose projections are plain parameters counts
    like any linear layer. A weight is seen where it is used as x W^T + b, its columns being its inputs; one that is
    used as x W is left out, and so is what no forward pass used. `parameters` are the model's own tensors by name.

    The products and their sums are float32 in a float32 model: over m forward passes the sums lose at most m 6e-8,
    relative. Memory: one [I, I] for each weight, whatever the number of passes.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Raises ValueError where two parameters lie in one piece of memory: their inputs cannot be told apart."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._name_of: dict[int, str] = {}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        for name, tensor in parameters.items():
            if not tensor.numel():
                continue
            place = tensor.untyped_storage().data_ptr()
            if place in self._name_of:
                raise ValueError(
                    f"{self._name_of[place]} and {name} share their memory, so their inputs cannot be told apart; load "
                    "the state into a model of its own"
                )
            self._name_of[place] = name
        self._grams: dict[str, tuple[Tensor, int]] = {}
        self._squares: dict[str, tuple[Tensor, int]] = {}
        self._fast_path = True

    @property
    def grams(self) -> dict[str, Float[Tensor, "I I"]]:
        """G = X^T X / N by weight: the mean over the rows X that the weight was multiplied by."""
        return {name: total / rows for name, (total, rows) in self._grams.items()}

    @property
    def squares(self) -> dict[str, Float[Tensor, " I"]]:
        """The mean squared input of each norm's scale, by the scale's name: of the normalised values it multiplies."""
        return {name: total / rows for name, (total, rows) in self._squares.items()}

    def __enter__(self) -> InputMoments:
        # The fused attention of inference takes both projections at once: nothing of it could be seen.
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.backends.mha.set_fastpath_enabled(self._fast_path)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operation's own result; what it tells of a parameter's inputs is added up beside it."""
        if func is ATEN.addmm.default:
            self._product(args[1], args[2])
        elif func is ATEN.mm.default:
            self._product(args[0], args[1])
        elif func is ATEN.linear.default:
            self._product(args[0], args[1].T)
        elif func in (ATEN.native_layer_norm.default, ATEN.layer_norm.default):
            self._scale(*args)
        return func(*args, **(kwargs or {}))

    def _product(self, x: Tensor, transposed: Tensor) -> None:
        """x @ transposed; a parameter's inputs if the right side is a view of W^T."""
        name = self._named(transposed)
        if name is None or len(self._shapes[name]) != 2:
            return
        width = self._shapes[name][1]
        if transposed.shape[0] == width and transposed.stride() == (1, width):
            x_NI = x.detach().reshape(-1, width)
            _add(self._grams, name, x_NI.T @ x_NI, len(x_NI))

    def _scale(self, x: Tensor, shape: Sequence[int], scale: Tensor | None = None, *rest: Any) -> None:
        """A layer norm over the last axis; `rest` holds its bias and its epsilon."""
        name = self._named(scale) if scale is not None else None
        if name is not None and len(shape) == 1:
            normalised = F.layer_norm(x.detach(), list(shape), eps=rest[1] if len(rest) > 1 else 1e-5)
            rows = normalised.reshape(-1, *self._shapes[name])
            _add(self._squares, name, rows.square().sum(0), len(rows))

    def _named(self, tensor: Tensor) -> str | None:
        return self._name_of.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None


def _add(sums: dict[str, tuple[Tensor, int]], name: str, total: Tensor, rows: int) -> None:
    if name in sums:
        before, counted = sums[name]
        sums[name] = (before.add_(total), counted + rows)
    else:
        sums[name] = (total, rows)
