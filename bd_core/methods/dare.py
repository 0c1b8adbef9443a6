"""DARE: drop entries of the task vectors at random and rescale the rest, before another merge.

Legend: K experts, n entries of a chunk.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from bd_core.methods.averages import task_arithmetic
from bd_core.methods.stream import Altered, Merged, StateDict
from bd_core.methods.ties import ties

__all__ = ["dare"]


def dare(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    drop: float = 0.5,
    scale: float = 0.3,
    then: Literal["task_arithmetic", "ties"] = "task_arithmetic",
    keep: float = 0.2,
    seed: int = 0,
) -> Merged:
    """The merge named by `then` on m_k * tau_k / (1 - drop), with every m_k entry 1 with probability 1 - drop.

    Source: Yu et al., Language Models are Super Mario (DARE), ICML 2024. `drop` (their p): the paper goes up to 0.9
    and beyond for language models; 0.5 is FusionBench's and mergekit's default. `scale` and `keep` are those of Task
    Arithmetic and Ties; `keep` counts only for Ties, whose trim is global and which sums.
    An entry's fate is a hash of `seed`, the expert's place, the tensor's name and the entry's index: a mask depends on
    no other tensor and is never held. FusionBench draws one mask after the other from the global generator, mergekit
    one per tensor: no two implementations drop the same entries.
    Cost: as the merge after it, and a hash an entry and reading.
    """
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"dare: drop={drop} must lie in [0, 1)")
    if not math.isfinite(scale):
        raise ValueError(f"dare: scale={scale} must be finite")
    if then not in ("task_arithmetic", "ties"):
        raise ValueError(f"dare: then={then!r} must be one of task_arithmetic, ties")
    dropped = [Altered(expert, _dropping(drop, seed, k)) for k, expert in enumerate(experts)]
    if then == "ties":
        return ties(base, dropped, keep=keep, scale=scale)
    return task_arithmetic(base, dropped, scale=scale)


def _dropping(drop: float, seed: int, k: int) -> Callable[[Tensor, str, int, int], None]:
    """Sets the dropped entries to zero and rescales the rest, in place."""
    smallest_kept = min(2**31 - 1, round(drop * 2**32) - 2**31)

    def alter(vector_n: Float[Tensor, " n"], name: str, first: int, stride: int) -> None:
        key = _signed(zlib.crc32(f"{seed}/{k}/{name}".encode()))
        last = first + stride * len(vector_n)
        index_n = torch.arange(first, last, stride, dtype=torch.int64, device=vector_n.device).to(torch.int32)
        # Twice, since neighbouring keys would else give masks that are shifted copies of each other.
        random_n = _mixed(_mixed(index_n).bitwise_xor_(key))
        vector_n.mul_(random_n >= smallest_kept).div_(1.0 - drop)

    return alter


def _mixed(bits_n: Int32[Tensor, " n"]) -> Int32[Tensor, " n"]:
    """Bits that look random: the finaliser of MurmurHash3 (Appleby, public domain), in place."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits_n.bitwise_xor_((bits_n >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(_signed(factor))
    return bits_n.bitwise_xor_((bits_n >> 16).bitwise_and_(0xFFFF))


def _signed(bits: int) -> int:
    """The 32 bits as the signed number they are to torch."""
    return bits - 2**32 if bits >= 2**31 else bits
