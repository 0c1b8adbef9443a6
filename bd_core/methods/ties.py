"""Ties-Merging: trim, elect sign, disjoint merge.

Legend: K experts, n all merged parameters of the model, `...` a parameter's own shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.task_vectors import check_compatible, is_merged, widened

__all__ = ["ties"]

StateDict = Mapping[str, Tensor]


def ties(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    keep: float = 0.2,
    scale: float = 0.3,
    trim: Literal["global", "per_tensor"] = "global",
    merge: Literal["sum", "mean"] = "sum",
) -> dict[str, Tensor]:
    """theta_0 + scale * tau with tau from three steps, entry by entry.

    1. Trim: of every tau_k keep the top `keep` share of magnitudes, zero the rest; over the flattened model
       (`trim="global"`, as the paper's code and FusionBench) or in every tensor (`"per_tensor"`, as mergekit).
    2. Elect: the sign of sum_k tau_k. Where the trimmed entries cancel exactly: the sign that most entries of the
       model have (global, as the paper's code), or plus (per_tensor, as mergekit).
    3. Disjoint merge: the sum (`merge="sum"`) or mean (`"mean"`) of the non-zero entries that agree with that sign.

    Source: Yadav et al., TIES-Merging, NeurIPS 2023. `keep` 0.2 is theirs; the released vision code sums, with 0.3.
    Cost: per tensor K float32 copies; `global` needs all magnitudes of one expert at a time (4 n bytes and a copy)
    for its threshold and one more pass for the majority sign.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"ties: keep={keep} must lie in (0, 1]")
    for name, value, known in (("trim", trim, ("global", "per_tensor")), ("merge", merge, ("sum", "mean"))):
        if value not in known:
            raise ValueError(f"ties: {name}={value!r} must be one of {', '.join(known)}")
    check_compatible(base, experts)
    names = [name for name in base if is_merged(name, base, experts)]
    thresholds: list[float] | None = None
    if trim == "global":
        thresholds = [_global_threshold(base, expert, names, keep) for expert in experts]

    def trimmed(name: str) -> Tensor:
        vectors = _vectors(base, experts, name)
        return _trim_per_tensor(vectors, keep) if thresholds is None else _trim_above(vectors, thresholds)

    tie_sign = 1.0
    if thresholds is not None:
        balance = sum(float(torch.sign(trimmed(name).sum(0)).sum(dtype=torch.float64)) for name in names)
        tie_sign = -1.0 if balance < 0 else 1.0
    merged = {name: origin.detach().clone() for name, origin in base.items()}
    for name in names:
        step = _disjoint_merge(trimmed(name), tie_sign, merge)
        merged[name] = (widened(base[name]) + scale * step).to(base[name].dtype)
    return merged


def _vectors(base: StateDict, experts: Sequence[StateDict], name: str) -> Tensor:
    wide = widened(base[name])
    return torch.stack([expert[name].detach().to(wide) - wide for expert in experts])


def _global_threshold(base: StateDict, expert: StateDict, names: Sequence[str], keep: float) -> float:
    """The smallest magnitude kept of this expert's flattened task vector; equals are kept too."""
    wide = max(
        (torch.promote_types(base[name].dtype, torch.float32) for name in names), key=lambda dtype: dtype.itemsize
    )
    magnitudes = torch.empty(sum(base[name].numel() for name in names), dtype=wide, device=base[names[0]].device)
    start = 0
    for name in names:
        size = base[name].numel()
        origin = widened(base[name])
        magnitudes[start : start + size] = (expert[name].detach().to(origin) - origin).abs().flatten()
        start += size
    # The paper's code: the (n - int(keep n))-th smallest magnitude is the last one kept.
    rank = len(magnitudes) - int(len(magnitudes) * keep)
    return float(magnitudes.kthvalue(rank).values) if rank >= 1 else 0.0


def _trim_above(vectors: Float[Tensor, "K ..."], thresholds: Sequence[float]) -> Float[Tensor, "K ..."]:
    bound = torch.tensor(thresholds, dtype=vectors.dtype, device=vectors.device)
    return vectors * (vectors.abs() >= bound.view(-1, *(1,) * (vectors.ndim - 1)))


def _trim_per_tensor(vectors: Float[Tensor, "K ..."], keep: float) -> Float[Tensor, "K ..."]:
    """The int(keep * size) largest magnitudes of each expert (at least one); ties in no stated order."""
    flat = vectors.flatten(1)
    if flat.shape[1] == 0:
        return vectors
    top = flat.abs().topk(max(1, int(keep * flat.shape[1])), dim=1).indices
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, top, True)
    return (flat * mask).view_as(vectors)


def _disjoint_merge(trimmed: Float[Tensor, "K ..."], tie_sign: float, merge: str) -> Float[Tensor, ...]:
    sign = torch.sign(trimmed.sum(0))
    sign = torch.where(sign == 0, torch.full_like(sign, tie_sign), sign)
    agreeing = trimmed * (torch.sign(trimmed) == sign)
    total = agreeing.sum(0)
    return total if merge == "sum" else total / (agreeing != 0).sum(0).clamp_min(1)
