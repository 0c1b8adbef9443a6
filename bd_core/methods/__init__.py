"""Merging methods: one file a method, one table of them all, one door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bd_core.methods.adamerging import AdaMerging, adamerging
from bd_core.methods.averages import task_arithmetic, weight_average
from bd_core.methods.registry import Method, check_parameters, find_method
from bd_core.methods.ties import ties
from bd_core.methods.twin_merging import TwinMerging, twin_merging

__all__ = [
    "METHODS",
    "AdaMerging",
    "Method",
    "TwinMerging",
    "adamerging",
    "merge",
    "task_arithmetic",
    "ties",
    "twin_merging",
    "weight_average",
]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("weight_average", "Weight average", weight_average, "nothing", "Model Soups, ICML 2022"),
        Method("task_arithmetic", "Task Arithmetic", task_arithmetic, "nothing", "Task Arithmetic, ICLR 2023"),
        Method("ties", "Ties-Merging", ties, "nothing", "TIES-Merging, NeurIPS 2023"),
        Method(
            "adamerging", "AdaMerging (layer-wise)", adamerging, "unlabelled batches", "AdaMerging, ICLR 2024", "fit"
        ),
        Method("twin_merging", "Twin-Merging", twin_merging, "task labels", "Twin-Merging, NeurIPS 2024", "per sample"),
    )
}


def merge(
    method: str, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], **parameters: Any
) -> dict[str, Tensor]:
    """One merged state dict, with the base's names, shapes and dtypes; the inputs are never modified.

    Raises ValueError for an unknown method or parameter (naming the nearest known ones), for checkpoints that do not
    fit each other, and for a method whose result is no single model.
    """
    found = find_method(METHODS, method)
    if found.result == "per sample":
        raise ValueError(
            f"{method} gives a model per sample, not one state dict; call bd_core.methods.{method} and run its parts "
            "with MergedModel"
        )
    check_parameters(found, parameters)
    result = found.function(base, experts, **parameters)
    merged: dict[str, Tensor] = result if found.result == "state" else result.merged
    return merged
