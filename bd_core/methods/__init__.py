"""Merging methods: one file a method, one table of them all, one door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bd_core.methods.adamerging import AdaMerging, adamerging
from bd_core.methods.registry import Method, check_parameters, find_method
from bd_core.methods.stream import Merged
from bd_core.methods.table import METHODS
from bd_core.methods.twin_merging import TwinMerging, twin_merging
from bd_core.task_vectors import check_layout

__all__ = [
    "METHODS",
    "AdaMerging",
    "Method",
    "TwinMerging",
    "adamerging",
    "merge",
    "merge_stream",
    "twin_merging",
]


def merge(
    method: str, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], **parameters: Any
) -> dict[str, Tensor]:
    """One merged state dict, with the base's names, order, shapes and dtypes; the inputs are never modified.

    Raises ValueError for an unknown method or parameter (naming the nearest known ones), for checkpoints that do not
    fit each other, and for a method whose result is no single model.
    """
    found = _checked(method, parameters)
    if found.result == "fit":
        fitted: dict[str, Tensor] = found.function(base, experts, **parameters).merged
        return fitted
    merged = dict(merge_stream(method, base, experts, **parameters))
    return {name: merged[name] for name in base} if found.experts == "checkpoints" else merged


def merge_stream(
    method: str, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], **parameters: Any
) -> Merged:
    """(name, merged tensor) one by one, in no stated order, each name of the base once; for models beyond memory.

    Keys, shapes and dtypes are checked before the first tensor, values as they are read. Raises ValueError as `merge`,
    and for a method that gives no single state dict tensor by tensor.
    """
    found = _checked(method, parameters)
    if found.result != "state":
        raise ValueError(f"{method} gives no merged state dict tensor by tensor; it needs {found.need}")
    if found.experts == "checkpoints":
        check_layout(base, experts)
    stream: Merged = found.function(base, experts, **parameters)
    return stream


def _checked(method: str, parameters: Mapping[str, Any]) -> Method:
    found = find_method(METHODS, method)
    if found.result == "per sample":
        raise ValueError(
            f"{method} gives a model per sample, not one state dict; call bd_core.methods.{method} and run its parts "
            "with MergedModel"
        )
    check_parameters(found, parameters)
    return found
