"""Arithmetic on state dicts: task vectors, the checks before it.

Legend: K experts; `...` a parameter's own shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.huge_pages import empty
from bd_core.layer_groups import LayerGroups, layer_groups

__all__ = [
    "IncompatibleCheckpoints",
    "LayerGroups",
    "TaskVectors",
    "add_task_vectors",
    "all_finite",
    "check_compatible",
    "check_layout",
    "layer_groups",
    "refuse_nonfinite",
    "same_integers",
    "task_vectors",
    "widened",
]

StateDict = Mapping[str, Tensor]

MAX_SHOWN = 12
# BatchNorm counts its training steps; inference never reads the count, so it takes the base's value (ours).
IGNORED_COUNTERS = ("num_batches_tracked",)


class IncompatibleCheckpoints(ValueError):
    """Experts that are no fine-tuned copies of the base: keys, shapes or dtypes differ."""


@dataclass(frozen=True)
class TaskVectors:
    """K task vectors tau_k = theta_k - theta_0, stacked per parameter.

    `vectors[name]` has shape [K, ...]. `constants` holds the integer and boolean buffers (and the non-finite but
    equal ones), which no arithmetic applies to; they are the base's own tensors.
    """

    vectors: dict[str, Float[Tensor, "K ..."]]
    constants: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = {len(stacked) for stacked in self.vectors.values()}
        if len(counts) != 1 or counts == {0}:
            raise ValueError(f"task vectors need one common number of experts K >= 1, got {sorted(counts)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that have task vectors, in state-dict order."""
        return tuple(self.vectors)

    @property
    def n_experts(self) -> int:
        """K."""
        return len(next(iter(self.vectors.values())))

    @property
    def size_bytes(self) -> int:
        """Bytes of all K task vectors."""
        return sum(stacked.numel() * stacked.element_size() for stacked in self.vectors.values())


def task_vectors(base: StateDict, experts: Sequence[StateDict]) -> TaskVectors:
    """K task vectors, tau_k = theta_k - theta_0, in float32 (float64 stays float64).

    Half-precision checkpoints are widened first: the difference of two bfloat16 numbers is not a bfloat16 number.
    An expert equal to the base gives zero vectors. Costs K float32 copies of the base.

    Raises `IncompatibleCheckpoints` for differing keys, shapes, dtypes or integer buffers, `ValueError` for NaN.
    """
    check_compatible(base, experts)
    vectors: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    for name, origin in base.items():
        if is_merged(name, base, experts):
            wide = widened(origin)
            vectors[name] = _stacked(wide, [expert[name].detach() for expert in experts])
        else:
            constants[name] = origin.detach()
    if not vectors:
        raise ValueError("the base holds no floating-point tensor: nothing to merge")
    return TaskVectors(vectors, constants)


def _stacked(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """Every expert's tensor minus the base's, in the base's dtype and on its device: [K, ...]."""
    vectors = empty((len(experts), *base.shape), base.dtype, base.device)
    for vector, expert in zip(vectors, experts, strict=True):
        torch.sub(expert.to(base), base, out=vector)
    return vectors


def add_task_vectors(
    base: StateDict, vectors: TaskVectors, coefficients: Mapping[str, Float[Tensor, " K"]] | Float[Tensor, " K"]
) -> dict[str, Tensor]:
    """Merged state dict theta_0 + sum_k c_k tau_k, in the base's dtypes; sums run in float32.

    `coefficients` is one vector for all parameters or one a parameter. Every tensor is a new one.
    """
    merged: dict[str, Tensor] = {}
    for name, origin in base.items():
        if name not in vectors.vectors:
            merged[name] = origin.detach().clone()
            continue
        c_K = coefficients[name] if isinstance(coefficients, Mapping) else coefficients
        stacked = vectors.vectors[name]
        step = torch.tensordot(c_K.detach().to(stacked), stacked, dims=1)
        merged[name] = (widened(origin).to(step.dtype) + step).to(origin.dtype)
    return merged


def check_layout(base: StateDict, experts: Sequence[StateDict]) -> None:
    """Nothing, if every expert has the base's keys, shapes and dtypes; no value is looked at.

    Raises `IncompatibleCheckpoints` with all differences in one message (the first dozen spelled out, the rest
    counted).
    """
    _check_differences(base, experts, values=False)


def check_compatible(base: StateDict, experts: Sequence[StateDict]) -> None:
    """Nothing, if every expert is a fine-tuned copy of the base by keys, shapes, dtypes and integer buffers.

    Raises `IncompatibleCheckpoints` as `check_layout`, and `ValueError` naming the first tensor that holds NaN or an
    infinity of its own.
    """
    _check_differences(base, experts, values=True)
    _check_finite(base, experts)


def _check_differences(base: StateDict, experts: Sequence[StateDict], values: bool) -> None:
    if not base:
        raise ValueError("the base checkpoint is empty")
    if not experts:
        raise ValueError("no expert given: merging needs K >= 1 experts")
    found = [line for k, expert in enumerate(experts) for line in _differences(base, expert, f"expert {k}", values)]
    if found:
        shown = "\n".join(f"  {line}" for line in islice(found, MAX_SHOWN))
        rest = f"\n  ... and {len(found) - MAX_SHOWN} more" if len(found) > MAX_SHOWN else ""
        raise IncompatibleCheckpoints(
            f"experts differ from the base in {len(found)} places:\n{shown}{rest}\n"
            "Give experts fine-tuned from this very base, with the same layout and dtype."
        )


def is_merged(name: str, base: StateDict, experts: Sequence[StateDict]) -> bool:
    """Whether arithmetic applies to this tensor: floating point, and not one shared constant with infinities."""
    origin = base[name]
    if not origin.is_floating_point():
        return False
    # Only a buffer such as a causal mask is allowed infinities: equal everywhere, it is copied.
    return bool(torch.isfinite(origin).all()) or not all(torch.equal(origin, expert[name]) for expert in experts)


def widened(tensor: Tensor) -> Tensor:
    """The tensor, detached, in float32 (float64 stays), the dtype all merging arithmetic runs in."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    return bool(torch.isfinite(tensor).all())


def refuse_nonfinite(name: str, tensor: Tensor, origin: Tensor, who: str) -> None:
    """Nothing, unless the tensor holds NaN, or infinities and is not the base's `origin` over again: ValueError."""
    if all_finite(tensor):
        return
    if bool(torch.isnan(tensor).any()):
        raise ValueError(f"{who}: {name} holds NaN; take an earlier checkpoint of it")
    if not torch.equal(tensor, origin):
        raise ValueError(f"{who}: {name} holds infinities that are not the base's; take an earlier checkpoint")


def same_integers(name: str, tensor: Tensor, origin: Tensor) -> bool:
    """Whether an integer or boolean tensor may be taken from the base: it is equal, or a counter nobody reads."""
    return name.endswith(IGNORED_COUNTERS) or torch.equal(tensor, origin)


def _differences(base: StateDict, expert: StateDict, who: str, values: bool) -> Iterator[str]:
    for name in base:
        if name not in expert:
            yield f"{who}: {name} is missing"
    for name, tensor in expert.items():
        if name not in base:
            yield f"{who}: {name} is not in the base"
            continue
        origin = base[name]
        if tensor.shape != origin.shape:
            yield f"{who}: {name} has shape {list(tensor.shape)}, the base {list(origin.shape)}"
        elif tensor.dtype != origin.dtype:
            yield f"{who}: {name} is {tensor.dtype}, the base {origin.dtype}"
        elif values and not origin.is_floating_point() and not same_integers(name, tensor, origin):
            yield f"{who}: {name} ({origin.dtype}) has other values; integer tensors cannot be merged"


def _check_finite(base: StateDict, experts: Sequence[StateDict]) -> None:
    labelled = [("the base", base), *((f"expert {k}", expert) for k, expert in enumerate(experts))]
    for name, origin in base.items():
        if not origin.is_floating_point():
            continue
        for who, state in labelled:
            tensor = state[name]
            refuse_nonfinite(name, tensor, origin, who)
            if not all_finite(tensor) and is_merged(name, base, experts):
                raise ValueError(f"{who}: {name} holds infinities that are not the base's; take an earlier checkpoint")
