"""Whether a batched form agrees with explicitly merged parameters, on two samples.

Legend: G layer groups, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bd_core.merged.fallback import VmapModule, one_sample

__all__ = ["disagreement"]

# Relative error of the whole output, about ten times what rounding alone gave on deep towers.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def disagreement(
    batched: Callable[[Tensor], Any],
    reference: VmapModule,
    inputs: Sequence[Any],
    shared: dict[str, Any],
    like_weights: Tensor,
) -> str | None:
    """Why the batched form is not to be trusted, or None.

    Runs the two samples with fixed, distinct probe weights: real ones may be so alike that mixing samples up would
    not show. A batched form that raises is no batched form; should the model itself be at fault, it raises again
    where its own forward pass can be seen.
    """
    probe_2GK = _probe_weights(like_weights)
    with torch.no_grad():
        expected = [
            one_sample(
                reference._held[0],
                reference.merged(),
                reference.constants(),
                probe_2GK[b],
                [x[b : b + 1] if isinstance(x, Tensor) else x for x in inputs],
                shared,
            )
            for b in range(2)
        ]
        try:
            found = batched(probe_2GK)
        except Exception as error:  # noqa: BLE001 - any failure of the attempt means: take the other way
            return f"its batched form raises {type(error).__name__}: {error}"
    for i, (given, *each) in enumerate(zip(*(_tensors(output) for output in (found, *expected)), strict=True)):
        wanted = torch.cat(each)
        if given.shape != wanted.shape:
            return f"its batched form gives output {i} shape {list(given.shape)} instead of {list(wanted.shape)}"
        error = float((given - wanted).double().norm() / wanted.double().norm().clamp_min(1e-30))
        tolerance = _tolerance(given)
        if not error <= tolerance:
            return f"its batched form differs from explicit merging by {error:.1e} in output {i} (over {tolerance:.0e})"
    return None


def _probe_weights(like: Tensor) -> Tensor:
    shape = (2, *like.shape[1:])
    n = shape[0] * shape[1] * shape[2]
    # Golden-ratio steps: no two equal, none zero, the same at every call.
    return torch.frac(torch.arange(1, n + 1, device=like.device) * 0.6180339887).view(shape).to(like.dtype)


def _tolerance(x: Tensor) -> float:
    tolerance = TOLERANCE[x.dtype]
    if torch.is_autocast_enabled(x.device.type):
        tolerance = max(tolerance, TOLERANCE[torch.get_autocast_dtype(x.device.type)])
    # Products and convolutions each have a switch, and a patch-wise convolution runs as a product here.
    uses_tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    if x.is_cuda and x.dtype == torch.float32 and uses_tf32:
        tolerance = max(tolerance, 2e-3)
    return tolerance


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of a nested output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.ndim else []
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for part in output for tensor in _tensors(part)] if isinstance(output, (tuple, list)) else []
