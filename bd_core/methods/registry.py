"""The record of a merging method and the one door to all of them.

Legend: K experts.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

__all__ = ["DATA", "Memory", "Method", "Need", "check_parameters", "find_method"]

StateDict = Mapping[str, Tensor]
Need = Literal["nothing", "unlabelled activations", "unlabelled batches", "task labels", "labelled validation"]
Memory = Literal["chunk", "tensor", "matrices", "model"]
# What a need is met with, by whoever has the data: no setting.
DATA = frozenset({"grams", "squares", "logits", "batches", "validate", "features", "merged", "search"})


@dataclass(frozen=True)
class Method:
    """One merging method: what to call, what it needs, what it costs and where it comes from.

    `function(base, experts, **parameters)` returns what `result` says: the merged tensors one by one ("state"), an
    object whose `.merged` is a state dict ("fit"), or the parts of a per-sample model ("per sample"). `memory` is what
    it holds beside in- and output: a chunk of K task vectors, those of one tensor, those of a batch of matrices, or
    something of the model's size. `experts` are checkpoints, or LoRA adapters.
    """

    name: str
    title: str
    function: Callable[..., Any]
    need: Need
    source: str
    cost: str
    memory: Memory = "chunk"
    result: Literal["state", "fit", "per sample"] = "state"
    experts: Literal["checkpoints", "adapters"] = "checkpoints"

    @property
    def defaults(self) -> dict[str, Any]:
        """Optional settings and their defaults, read off the function: documented once."""
        return {p.name: p.default for p in self._parameters() if p.default is not p.empty}

    @property
    def required(self) -> tuple[str, ...]:
        """Settings without a default, and the data it cannot do without."""
        return tuple(p.name for p in self._parameters() if p.default is p.empty)

    @property
    def from_files(self) -> bool:
        """Whether checkpoints alone are enough to merge, if with less than it could use."""
        return self.result == "state" and not DATA.intersection(self.required)

    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())[2:]


def find_method(methods: Mapping[str, Method], name: str) -> Method:
    """The method of this name; ValueError with the nearest names otherwise."""
    if name in methods:
        return methods[name]
    raise ValueError(f"no merging method {name!r}; {_nearest(name, list(methods))}")


def check_parameters(method: Method, parameters: Mapping[str, object]) -> None:
    """Nothing; ValueError for a parameter the method does not take, or one it needs and did not get."""
    known = [*method.required, *method.defaults]
    for name in parameters:
        if name not in known:
            raise ValueError(f"{method.name} has no parameter {name!r}; {_nearest(name, known)}")
    missing = [name for name in method.required if name not in parameters]
    if missing:
        raise ValueError(f"{method.name} needs {', '.join(missing)} (it needs {method.need})")


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(known)}" if known else "it takes none"
