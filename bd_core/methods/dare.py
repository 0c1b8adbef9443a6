"""DARE: drop entries of the task vectors at random and rescale the rest, before another merge.

Legend: K experts, n entries of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from bd_core.methods.averages import task_arithmetic
from bd_core.methods.stream import Merged, StateDict, merged_names
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
    The masks are drawn per expert and tensor from `seed`, so a tensor's mask depends on no other tensor's.
    FusionBench draws one mask after the other from the global generator, mergekit from one per tensor: no two
    implementations drop the same entries.
    Cost: as the merge after it, and one random number an entry and reading; one tensor of one expert at a time.
    """
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"dare: drop={drop} must lie in [0, 1)")
    if not math.isfinite(scale):
        raise ValueError(f"dare: scale={scale} must be finite")
    if then not in ("task_arithmetic", "ties"):
        raise ValueError(f"dare: then={then!r} must be one of task_arithmetic, ties")
    dropped = [_Dropped(base, expert, drop, seed, k) for k, expert in enumerate(experts)]
    if then == "ties":
        return ties(base, dropped, keep=keep, scale=scale)
    return task_arithmetic(base, dropped, scale=scale)


class _Dropped(Mapping[str, Tensor]):
    """An expert whose task vector has lost entries: read lazily, the same at every reading."""

    def __init__(self, base: StateDict, expert: StateDict, drop: float, seed: int, k: int) -> None:
        self._base, self._expert, self._drop = base, expert, drop
        names = merged_names(base)
        self._seeds = {name: (seed * 1_000_003 + k) * 1_000_003 + place for place, name in enumerate(names)}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._seeds:
            return self._expert[name]
        origin, tensor = self._base[name].detach(), self._expert[name].detach()
        wide = torch.promote_types(origin.dtype, torch.float32)
        generator = torch.Generator(device=origin.device).manual_seed(self._seeds[name] % 2**63)
        kept = torch.empty(origin.shape, dtype=torch.float32, device=origin.device)
        kept.uniform_(generator=generator)
        vector = tensor.to(wide).sub(origin)
        return vector.mul_(kept >= self._drop).div_(1.0 - self._drop).add_(origin)

    def __contains__(self, name: object) -> bool:
        return name in self._expert

    def __iter__(self) -> Iterator[str]:
        return iter(self._expert)

    def __len__(self) -> int:
        return len(self._expert)
