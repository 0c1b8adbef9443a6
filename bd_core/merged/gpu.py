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
MAX_EXPERTS = 64
SHARED_BYTES = 120 << 10  # what the tiles take at most, with 64 experts and matrices in float32 (A100: 163, H200: 227)
OLDEST = (8, 0)  # compute capability: bfloat16 products on tensor cores


def triton_fits(x_BTI: Tensor, base_OI: Tensor, vectors_KOI: Tensor) -> bool:
    """Whether the kernel can run: a GPU it was written for, Triton, no float64; any strides, dtypes may differ."""
    operands = (x_BTI, base_OI, vectors_KOI)
    fit = all(t.is_cuda and t.dtype in DTYPES for t in operands) and len(vectors_KOI) <= MAX_EXPERTS
    return fit and _can_run(x_BTI.device)


@cache
def _can_run(device: torch.device) -> bool:
    if find_spec("triton") is None:
        return False
    gpu = torch.cuda.get_device_properties(device)
    shared_bytes = getattr(gpu, "shared_memory_per_block_optin", 0)  # AMD's have no such entry
    return (gpu.major, gpu.minor) >= OLDEST and shared_bytes >= SHARED_BYTES
