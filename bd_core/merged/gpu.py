"""Whether the GPU kernel of the exact per-sample linear map can run; Triton is imported only where it does.

Legend: B batch, T tokens, I inputs, O outputs, K experts.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["triton_fits"]

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
OLDEST = (8, 0)  # compute capability: bfloat16 products on tensor cores


def triton_fits(x_BTI: Tensor, base_OI: Tensor, vectors_KOI: Tensor) -> bool:
    """Whether the kernel can run: a GPU it was written for, Triton, no float64; dtypes may differ, any strides."""
    operands = (x_BTI, base_OI, vectors_KOI)
    return all(t.is_cuda and t.dtype in DTYPES for t in operands) and _can_run(x_BTI.device)


@cache
def _can_run(device: torch.device) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= OLDEST
