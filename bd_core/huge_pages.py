"""Large tensors in huge pages of 2 MiB, where Linux has them to give.

Matrices that are read in blocks cost nearly as much in the translation of addresses as in reading: the processor keeps
some thousands of translations, 8 MiB at 4 KiB a page.
Where they cannot be had (another system, an administrator's "never") a tensor lies where torch would put it.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

__all__ = ["empty"]

CPU = torch.device("cpu")
LEAST_BYTES = 4 << 20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """An uninitialised tensor; on the CPU, from 4 MiB on, in huge pages."""
    n_bytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or n_bytes < LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
