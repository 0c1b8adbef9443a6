"""RobustMerge: LoRA adapters merged factor by factor.

Legend: K adapters, R rank, I inputs and O outputs of a module, whose weight is [O, I], its factors A [R, I], B [O, R].
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.methods.stream import Merged, StateDict, finish
from bd_core.task_vectors import IncompatibleCheckpoints, all_finite, refuse_nonfinite, widened

__all__ = ["merge_adapters", "robust_merge"]

PREFIX = "base_model.model."  # PEFT's, before the name the base knows
# PEFT's files say `<module>.lora_A.weight`, its modules in memory `<module>.lora_A.<adapter>.weight`.
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")


def robust_merge(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    scaling: float | Sequence[float],
    keep: float = 0.2,
    top_rows: float = 0.2,
    scale: float = 2.0,
    fan_in_fan_out: bool = False,
) -> Merged:
    """theta_0 + scaling_0 * B A of every adapted weight, A and B as `merge_adapters` gives them.

    `experts` are LoRA adapters, `scaling` is alpha / r of all or of each, from their configurations. Weights that the
    adapters hold whole (PEFT's modules to save) become their mean; everything else is the base's. `fan_in_fan_out`,
    as in PEFT: the base keeps its weights as [I, O] (GPT-2). Raises ValueError as `merge_adapters`, and for a module
    whose weight the base lacks or has in another shape.

    Source: Zeng et al., RobustMerge, NeurIPS 2025; the rest: `merge_adapters`. Cost: one pass over the base;
    beside in- and output one module's factors.
    """
    check = _Settings(keep, top_rows, scale, _scalings(scaling, len(experts)))

    def stream() -> Merged:
        parsed = _parsed(experts)
        weight_of = {f"{module}.weight": module for module in parsed[0].factors}
        for name in (*weight_of, *parsed[0].others):
            if name not in base:
                close = difflib.get_close_matches(name, list(base), n=1)
                raise ValueError(
                    f"robust_merge: the adapters change {name}, which the base lacks"
                    + (f"; the nearest it has is {close[0]}" if close else "; give the base they were trained on")
                )
        for name, origin in base.items():
            if origin.is_floating_point():
                refuse_nonfinite(name, origin, origin, "the base")
            if name in parsed[0].others:
                yield name, _mean(parsed, name, origin)
                continue
            if name not in weight_of:
                yield name, origin.detach().clone()
                continue
            a_RI, b_OR = _merged_factors(parsed, weight_of[name], check)
            step = check.scalings[0] * (b_OR @ a_RI)
            step = step.T if fan_in_fan_out else step
            if step.shape != origin.shape:
                raise ValueError(
                    f"robust_merge: the adapters change {name} by {list(step.shape)}, the base has {list(origin.shape)}"
                    "; give the base they were trained on (fan_in_fan_out for weights kept as [inputs, outputs])"
                )
            yield name, finish(origin, step)

    return stream()


def merge_adapters(
    adapters: Sequence[StateDict],
    *,
    scaling: float | Sequence[float] = 1.0,
    keep: float = 0.2,
    top_rows: float = 0.2,
    scale: float = 2.0,
) -> dict[str, Tensor]:
    """The merged adapter, with the first adapter's names and dtypes, to be used with the first adapter's scaling.

    Of each A_k and B_k the `keep` share of largest magnitudes is kept, and what is lost is made up for in B:
        s_k[r] = sum_i |A_k[r, i]| / sum_i |kept A_k[r, i]|, raised to the least of adapter k's `top_rows` share,
        A = scale sum_k kept A_k,   B = scale sum_k s_k kept B_k / sum_k s_k   (column r weighed by s_k[r]).
    A row of A that loses everything counts as s = 1 (ours; x/0 as released). Adapters of other scaling than the first
    have it moved into B_k (ours; the paper's all share one). Whole weights in the adapters become their mean.

    Source: Zeng et al., RobustMerge, NeurIPS 2025, in the released form; `keep`, `top_rows` and `scale` are its own.
    As A sums and B averages, the product grows with K: K = 1 gives `scale`^2 times the pruned adapter.
    Raises ValueError for adapters of other modules or ranks than the first, for anything but linear LoRA, and NaN.
    """
    check = _Settings(keep, top_rows, scale, _scalings(scaling, len(adapters)))
    parsed = _parsed(adapters)
    first = adapters[0]
    merged: dict[str, Tensor] = {}
    for module, keys in parsed[0].factors.items():
        for key, factor in zip(keys, _merged_factors(parsed, module, check), strict=True):
            merged[key] = factor.to(first[key].dtype)
    for name, key in parsed[0].others.items():
        merged[key] = _mean(parsed, name, first[key])
    return {key: merged[key] for key in first}


@dataclass(frozen=True)
class _Settings:
    keep: float
    top_rows: float
    scale: float
    scalings: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, share in (("keep", self.keep), ("top_rows", self.top_rows)):
            if not 0.0 < share <= 1.0:
                raise ValueError(f"robust_merge: {name}={share} must lie in (0, 1]")
        if not math.isfinite(self.scale):
            raise ValueError(f"robust_merge: scale={self.scale} must be finite")


@dataclass(frozen=True)
class _Adapter:
    """One adapter's tensors, by the base's module names: keys of A and B, and of weights it holds whole."""

    tensors: StateDict
    factors: dict[str, tuple[str, str]]
    others: dict[str, str]


def _scalings(scaling: float | Sequence[float], n_adapters: int) -> tuple[float, ...]:
    scalings = tuple(scaling) if isinstance(scaling, Sequence) else (scaling,) * max(1, n_adapters)
    if len(scalings) != max(1, n_adapters):
        raise ValueError(f"robust_merge: {len(scalings)} scalings for {n_adapters} adapters; give one, or one each")
    if not all(math.isfinite(value) and value > 0 for value in scalings):
        raise ValueError(f"robust_merge: scaling={scaling} must be above 0 and finite; it is alpha / r")
    return scalings


def _parsed(adapters: Sequence[StateDict]) -> list[_Adapter]:
    if not adapters:
        raise ValueError("no expert given: merging needs K >= 1 experts")
    parsed = [_parse(adapter, f"expert {k}") for k, adapter in enumerate(adapters)]
    first = parsed[0]
    for k, other in enumerate(parsed[1:], start=1):
        for kind, known, found in (
            ("module", first.factors.keys(), other.factors.keys()),
            ("weight", first.others.keys(), other.others.keys()),
        ):
            if missing := sorted(known - found):
                raise IncompatibleCheckpoints(f"expert {k} lacks {kind} {missing[0]}, which expert 0 adapts")
            if added := sorted(found - known):
                raise IncompatibleCheckpoints(f"expert {k} adapts {kind} {added[0]}, which expert 0 lacks")
        pairs = [(name, key, other.others[name]) for name, key in first.others.items()]
        for module, keys in first.factors.items():
            pairs += [(module, key, theirs) for key, theirs in zip(keys, other.factors[module], strict=True)]
        for name, key, theirs in pairs:
            ours, shape = list(first.tensors[key].shape), list(other.tensors[theirs].shape)
            if ours != shape:
                raise IncompatibleCheckpoints(
                    f"{theirs} is {shape} in expert {k}, {ours} in expert 0; {name} needs one shape and rank"
                )
    return parsed


def _parse(tensors: StateDict, who: str) -> _Adapter:
    sides: dict[str, dict[str, str]] = {}
    others: dict[str, str] = {}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(f"{who}: {key} holds NaN or infinities; take an earlier checkpoint of it")
        name = key.removeprefix(PREFIX)
        found = FACTOR.fullmatch(name)
        if found and tensor.ndim == 2:
            sides.setdefault(found["module"], {})[found["side"]] = key
        elif "lora_" in name:
            raise ValueError(
                f"{who}: {key} {list(tensor.shape)} is no factor of a linear layer; merge adapters with lora_A and "
                "lora_B matrices only"
            )
        else:
            others[name] = key
    for module, found_sides in sides.items():
        if missing := {"A", "B"} - found_sides.keys():
            raise IncompatibleCheckpoints(f"{who}: {module} has no lora_{missing.pop()}")
        a_RI, b_OR = tensors[found_sides["A"]], tensors[found_sides["B"]]
        if a_RI.shape[0] != b_OR.shape[1]:
            raise IncompatibleCheckpoints(f"{who}: {module} has rank {a_RI.shape[0]} in A and {b_OR.shape[1]} in B")
    if not sides:
        raise IncompatibleCheckpoints(f"{who} holds no lora_A and lora_B matrices: it is no LoRA adapter")
    return _Adapter(tensors, {module: (found["A"], found["B"]) for module, found in sides.items()}, others)


def _merged_factors(
    parsed: Sequence[_Adapter], module: str, check: _Settings
) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
    a_KRI, b_KOR = (
        torch.stack([widened(adapter.tensors[adapter.factors[module][side]]) for adapter in parsed]) for side in (0, 1)
    )
    ratio_K = torch.tensor([value / check.scalings[0] for value in check.scalings]).to(b_KOR)
    b_KOR = b_KOR * ratio_K[:, None, None]
    kept_a_KRI, kept_b_KOR = _pruned(a_KRI, check.keep), _pruned(b_KOR, check.keep)
    left_KR = kept_a_KRI.abs().sum(2)
    s_KR = torch.where(left_KR > 0, a_KRI.abs().sum(2) / left_KR, 1.0)
    least_K1 = s_KR.sort(dim=1).values[:, int(s_KR.shape[1] * (1 - check.top_rows)), None]
    s_KR = torch.maximum(s_KR, least_K1)
    b_OR = check.scale * (s_KR[:, None] * kept_b_KOR).sum(0) / s_KR.sum(0)
    return check.scale * kept_a_KRI.sum(0), b_OR


def _pruned(factors_KXY: Float[Tensor, "K X Y"], keep: float) -> Float[Tensor, "K X Y"]:
    magnitude_Kn = factors_KXY.abs().flatten(1)
    rank = int(magnitude_Kn.shape[1] * (1 - keep))  # as released: one entry more than the share stays
    if rank < 1:
        return factors_KXY
    least_K = magnitude_Kn.kthvalue(rank, dim=1).values
    return factors_KXY * (factors_KXY.abs() >= least_K[:, None, None])


def _mean(parsed: Sequence[_Adapter], name: str, origin: Tensor) -> Tensor:
    tensors = [adapter.tensors[adapter.others[name]] for adapter in parsed]
    if tensors[0].shape != origin.shape:
        raise ValueError(f"robust_merge: {name} is {list(tensors[0].shape)}, the base has {list(origin.shape)}")
    if not origin.is_floating_point():
        if not all(torch.equal(tensor, tensors[0]) for tensor in tensors):
            raise IncompatibleCheckpoints(f"{name} ({origin.dtype}) differs between adapters; integers have no mean")
        return tensors[0].detach().clone()
    return torch.stack([widened(tensor) for tensor in tensors]).mean(0).to(origin.dtype)
