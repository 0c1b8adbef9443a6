"""Per-sample merging of what has no batched form: torch.func over explicitly merged parameters.

Legend: B batch, S samples of a chunk, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from bd_core.merged.outputs import concatenated, first
from bd_core.merged.tensors import MergedTensor

__all__ = ["VmapModule", "merged_parameters", "one_sample"]

CHUNK_BYTES = 256 << 20
PLAIN_BATCH_NORMS = frozenset({"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"})


class VmapModule(nn.Module):
    """A module whose every sample runs with its own merged parameters, by `vmap(functional_call)`.

    Positional tensors carry the samples first; keyword arguments are shared. Works through the batch in chunks whose
    merged copies stay within `CHUNK_BYTES`; training recomputes a chunk in the backward pass instead of keeping them.
    """

    def __init__(self, module: nn.Module, tensors: dict[str, MergedTensor], constants: dict[str, Tensor]) -> None:
        super().__init__()
        # In a tuple, not registered: its placeholders must not be counted as parameters.
        self._held = (_with_differentiable_statistics(module),)
        self._names = tuple(tensors)
        self._constants = tuple(constants)
        self.tensors = nn.ModuleList(tensors.values())
        for i, tensor in enumerate(constants.values()):
            self.register_buffer(f"constant_{i}", tensor, persistent=False)

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> VmapModule:
        # Buffers outside the state dict live there and move along.
        self._held[0]._apply(function, recurse)  # type: ignore[no-untyped-call]
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        return self

    def merged(self) -> dict[str, MergedTensor]:
        """The merged tensors by their name in the module."""
        return dict(zip(self._names, self.tensors, strict=True))  # type: ignore[arg-type]

    def constants(self) -> dict[str, Tensor]:
        """The tensors that are not merged, by their name in the module."""
        return {name: getattr(self, f"constant_{i}") for i, name in enumerate(self._constants)}

    def forward(self, *inputs: Any, **shared: Any) -> Any:
        """The module's output, samples first."""
        routing = next(iter(self.merged().values())).routing
        weights_BGK = routing.weights_BGK
        assert weights_BGK is not None
        for x in inputs:
            if isinstance(x, Tensor):
                routing.check_batch(x, type(self._held[0]).__name__)
        bytes_each = sum(t.base.numel() * t.base.element_size() for t in self.merged().values())
        n_chunk = max(1, CHUNK_BYTES // max(1, bytes_each))
        outputs = []
        for start in range(0, len(weights_BGK), n_chunk):
            part = slice(start, start + n_chunk)
            chunk = [x[part] if isinstance(x, Tensor) else x for x in inputs]
            if torch.is_grad_enabled():
                outputs.append(checkpoint(self._chunk, weights_BGK[part], chunk, shared, use_reentrant=False))
            else:
                outputs.append(self._chunk(weights_BGK[part], chunk, shared))
        return outputs[0] if len(outputs) == 1 else concatenated(outputs)

    def _chunk(self, weights_SGK: Tensor, inputs: list[Any], shared: dict[str, Any]) -> Any:
        def one(weights_GK: Tensor, *tensors: Tensor) -> Any:
            given = iter(tensors)
            args = [next(given)[None] if isinstance(x, Tensor) else x for x in inputs]
            return first(one_sample(self._held[0], self.merged(), self.constants(), weights_GK, args, shared))

        with _batchable_attention():
            return vmap(one, randomness="same")(weights_SGK, *(x for x in inputs if isinstance(x, Tensor)))


def one_sample(
    module: nn.Module,
    tensors: dict[str, MergedTensor],
    constants: dict[str, Tensor],
    weights_GK: Tensor,
    args: list[Any],
    shared: dict[str, Any],
) -> Any:
    """The module's output for a batch of one, by `functional_call` with that sample's merged parameters."""
    parameters = {**merged_parameters(tensors, weights_GK), **constants}
    return functional_call(module, parameters, tuple(args), shared, tie_weights=False, strict=False)


def merged_parameters(tensors: dict[str, MergedTensor], weights_GK: Tensor) -> dict[str, Tensor]:
    """theta_0 + sum_k w_k tau_k for the weights of one sample."""
    return {name: t.of_sample(weights_GK[t.group]) for name, t in tensors.items()}


@contextmanager
def _batchable_attention() -> Iterator[None]:
    """Attention by plain operations: the fused kernels have no rule for vmap."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _BatchNorm(nn.Module):
    """Batch normalisation in evaluation by plain operations: torch's has no gradient to the running statistics."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self._parameters, self._buffers, self.eps = layer._parameters, layer._buffers, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        own = (1, -1, *(1,) * (x.ndim - 2))
        y = (x - self.running_mean.view(own)) * torch.rsqrt(self.running_var.view(own) + self.eps)
        if self.weight is None or self.bias is None:
            return y
        return y * self.weight.view(own) + self.bias.view(own)


def _with_differentiable_statistics(module: nn.Module) -> nn.Module:
    if type(module).__name__ in PLAIN_BATCH_NORMS and module._buffers["running_mean"] is not None:
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        return _BatchNorm(module)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _with_differentiable_statistics(child)
    return module
