"""Whether a model, its base, its task vectors and its layer groups belong together.

Legend: G layer groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from bd_core.compression import CompressedVectors
from bd_core.task_vectors import LayerGroups, TaskVectors

__all__ = ["check_fit", "count_groups"]


def check_fit(model: nn.Module, base: Mapping[str, Tensor], vectors: TaskVectors | CompressedVectors) -> None:
    """Nothing; raises ValueError naming the first parameter that does not fit."""
    own = model.state_dict()
    shapes = _shapes(vectors)
    for name, tensor in own.items():
        if name not in base:
            raise ValueError(f"the base lacks {name}, which the model needs")
        if base[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {list(base[name].shape)} in the base, {list(tensor.shape)} in the model"
            )
        if base[name].is_floating_point() and name not in shapes and name not in vectors.constants:
            raise ValueError(f"the experts lack {name}, which the base has")
    for name in base:
        if name not in own:
            raise ValueError(f"the base has {name}, which the model does not know")
    for name, shape in shapes.items():
        if name not in base:
            raise ValueError(f"the experts have {name}, which the base lacks")
        if shape != base[name].shape:
            raise ValueError(f"task vectors of {name} have shape {list(shape)}, the base {list(base[name].shape)}")
        if not all(bool(torch.isfinite(part).all()) for part in _parts(vectors, name)):
            raise ValueError(f"task vectors of {name} hold NaN or infinities")


def count_groups(index: Mapping[str, int], names: Iterable[str], groups: object) -> int:
    """G; raises ValueError for a name without a group, or with a negative one."""
    for name in names:
        if name not in index:
            raise ValueError(f"groups has no layer group for {name}")
        if index[name] < 0:
            raise ValueError(f"layer group of {name} is {index[name]}; groups count from 0")
    if isinstance(groups, LayerGroups):
        return groups.n_groups
    return 1 + max(index[name] for name in names)


def _shapes(vectors: TaskVectors | CompressedVectors) -> dict[str, tuple[int, ...]]:
    if isinstance(vectors, CompressedVectors):
        return vectors.shapes
    return {name: tuple(stacked.shape[1:]) for name, stacked in vectors.vectors.items()}


def _parts(vectors: TaskVectors | CompressedVectors, name: str) -> tuple[Tensor, ...]:
    if isinstance(vectors, CompressedVectors):
        return vectors.factors[name] if name in vectors.factors else (vectors.dense[name],)
    return (vectors.vectors[name],)
