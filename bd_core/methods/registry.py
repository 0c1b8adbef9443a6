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

__all__ = ["Method", "Need", "check_parameters", "find_method"]

StateDict = Mapping[str, Tensor]
Need = Literal["nothing", "unlabelled batches", "task labels"]


@dataclass(frozen=True)
class Method:
    """One merging method: what to call, what it needs and where it comes from.

    `function(base, experts, **parameters)` returns what `result` says: one state dict ("state"), an object whose
    `.merged` is one ("fit"), or the parts of a per-sample model ("per sample").
    """

    name: str
    title: str
    function: Callable[..., Any]
    need: Need
    source: str
    result: Literal["state", "fit", "per sample"] = "state"

    @property
    def defaults(self) -> dict[str, Any]:
        """Optional parameters and their defaults, read off the function: documented once."""
        parameters = list(inspect.signature(self.function).parameters.values())[2:]
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    @property
    def required(self) -> tuple[str, ...]:
        """Parameters without a default."""
        parameters = list(inspect.signature(self.function).parameters.values())[2:]
        return tuple(p.name for p in parameters if p.default is p.empty)


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
