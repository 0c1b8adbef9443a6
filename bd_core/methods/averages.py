"""Weight average and Task Arithmetic.

Legend: K experts, n entries of a chunk, theta_0 the base, tau_k = theta_k - theta_0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bd_core.methods.stream import Merged, StateDict, averaged, entrywise, merged_names, unmerged

__all__ = ["task_arithmetic", "weight_average"]


def weight_average(base: StateDict, experts: Sequence[StateDict]) -> Merged:
    """theta_0 + (1/K) sum_k tau_k, the mean of the experts, tensor by tensor.

    Source: Utans 1996; Wortsman et al., Model Soups, ICML 2022 (uniform soup). No parameter.
    Cost: one pass over the tensors; a chunk of task vectors beside in- and output.
    """
    yield from averaged(base, experts, merged_names(base))
    yield from unmerged(base, experts)


def task_arithmetic(base: StateDict, experts: Sequence[StateDict], *, scale: float = 0.3) -> Merged:
    """theta_0 + scale * sum_k tau_k, tensor by tensor.

    Source: Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023. `scale` (their lambda): 0.3 is the value
    used for eight tasks on CLIP ViT-B/32 there and in AdaMerging; with fewer experts larger values fit.
    Cost: as `weight_average`.
    """
    if not math.isfinite(scale):
        raise ValueError(f"task_arithmetic: scale={scale} must be finite")

    def merge() -> Merged:
        names = merged_names(base)
        yield from entrywise(base, experts, names, lambda vectors_Kn, name, start: vectors_Kn.sum(0).mul_(scale))
        yield from unmerged(base, experts)

    return merge()
