"""WEMoE: Task Arithmetic everywhere but in the MLPs, whose task vectors a gate weighs for every sample.

Legend: K experts, G gated blocks, D width of the gate's tokens, B batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bd_core.layer_groups import LayerGroups, layer_groups
from bd_core.methods.stream import StateDict, entrywise, expert_vectors, merged_names, unmerged
from bd_core.router import Router
from bd_core.task_vectors import TaskVectors, check_layout

__all__ = ["MLP", "WeMoE", "wemoe"]

# Modules of a block's MLP as open_clip, timm and Hugging Face CLIP name them, and Hugging Face ViT and BERT.
MLP = (r"\bmlp\.", r"\bintermediate\.dense\.", r"(?<!attention\.)\boutput\.dense\.")


@dataclass(frozen=True)
class WeMoE:
    """The weights of a WEMoE model: `MergedModel(model, moe.static, moe.vectors, moe.groups)` runs it.

    `static` is a whole state dict, theta_0 in the gated places; `vectors` the task vectors of the gated ones, `groups`
    one group a gated block. `initial` is the weight every expert starts with.
    """

    static: dict[str, Tensor]
    vectors: TaskVectors
    groups: LayerGroups
    initial: float

    def gate(
        self,
        width: int,
        *,
        hidden: int | None = None,
        kind: Literal["mlp", "linear"] = "mlp",
        generator: torch.Generator | None = None,
    ) -> Router:
        """Tokens [B, D] to unnormalised weights [B, G, K] that start near `initial`: Task Arithmetic to begin with."""
        n_experts, n_groups = self.vectors.n_experts, self.groups.n_groups
        return Router(width, n_experts, n_groups, hidden, kind, False, generator, output="free", initial=self.initial)


def wemoe(base: StateDict, experts: Sequence[StateDict], *, scale: float = 0.3, gated: Sequence[str] = MLP) -> WeMoE:
    """The parts of theta(x) = theta_0 + `scale` sum_k tau_k, but theta_0 + sum_k w_gk(x) tau_k in gated block g's MLP.

    A weight matrix is gated, with its bias, if its name holds one of the `gated` patterns (regular expressions).

    The gate is fitted elsewhere, on unlabelled batches: it must minimise the sum over the tasks of the mean entropy
    H(softmax(logits)) of the merged model, each task with its own head, every sample through its own weights; nothing
    else is trained. FusionBench takes Adam 1e-4, 1000 steps of 16 samples a task. That loss rewards confidence alone,
    and under noise it is known to collapse.

    Source: Tang et al., Merging Multi-Task Models via Weight-Ensembling Mixture of Experts, ICML 2024; `scale`, also
    the gates' start, is theirs. There every MLP has a gate of its own, two layers wide that read the hidden state
    which enters it, averaged over tokens; here one network reads the pretrained backbone's pooled tokens for all
    blocks, as BD-Merging's router (ours), so that the weights stand before the forward pass. FusionBench averages
    them over the batch; here a sample's result never depends on its batch.
    Cost: one pass over the tensors; K task vectors of the MLPs, about 2/3 of a transformer.
    Raises ValueError where no name matches, naming what the patterns were.
    """
    if not math.isfinite(scale):
        raise ValueError(f"wemoe: scale={scale} must be finite")
    check_layout(base, experts)
    names = merged_names(base)
    chosen = [name for name in names if _is_gated(name, base, gated)]
    if not chosen:
        raise ValueError(
            f"wemoe: no weight matrix is gated by the patterns {', '.join(gated)}; give `gated` patterns of your "
            f"model's MLPs (it has names such as {', '.join(names[:3])})"
        )
    vectors = {name: expert_vectors(base, experts, name) for name in chosen}
    rest = [name for name in names if name not in vectors]
    merged = dict(entrywise(base, experts, rest, lambda vectors_Kn, name, start: vectors_Kn.sum(0).mul_(scale)))
    merged |= dict(unmerged(base, experts))
    constants = {name: merged[name] for name in base if name in merged}
    static = {name: merged[name] if name in merged else base[name].detach().clone() for name in base}
    return WeMoE(static, TaskVectors(vectors, constants), layer_groups(chosen), scale)


def _is_gated(name: str, base: StateDict, patterns: Sequence[str]) -> bool:
    module, _, kind = name.rpartition(".")
    weight = f"{module}.weight"
    # A layer norm inside an MLP is no matrix, and stays with Task Arithmetic.
    is_linear = kind in ("weight", "bias") and weight in base and base[weight].ndim == 2
    return is_linear and any(re.search(pattern, name) for pattern in patterns)
