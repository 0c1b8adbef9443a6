"""One label space for tasks that share class names ("overlapping label spaces" is the paper's motive).

Shapes: C classes of the union, C_k classes of task k, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from bd_core.checks import check_option


@dataclass(frozen=True)
class LabelSpace:
    """The union of the tasks' classes: maps[task][local class] is the class's index in `classes`."""

    classes: tuple[str, ...]
    maps: dict[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        if not self.maps or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"LabelSpace: needs tasks and distinct classes, got {self.maps} and {self.classes}")
        for task, columns in self.maps.items():
            if not columns or len(set(columns)) != len(columns) or not set(columns) <= set(range(len(self.classes))):
                raise ValueError(
                    f"LabelSpace: maps[{task!r}] = {columns}, needs distinct indices below {len(self.classes)}; "
                    "build the space with unify_labels"
                )

    @property
    def n_classes(self) -> int:
        """How many classes the union has."""
        return len(self.classes)


def canonical_name(name: str) -> str:
    """The form under which two names are one class: case folded, `_` and `-` as spaces, single inner spaces."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def unify_labels(
    names: Mapping[str, Sequence[str]], union: Literal["by_name", "concatenate"] = "by_name"
) -> LabelSpace:
    """The label space of all tasks, classes in order of first appearance.

    `by_name` (ours, the default): equal canonical names of different tasks are one class. `concatenate` (ours): every
    task keeps its own classes, called "task/name".

    Raises ValueError for no task, a task without classes, an empty name, or two names of one task that are the same.
    """
    check_option(union, ("by_name", "concatenate"), "union", "unify_labels")
    if not names:
        raise ValueError("unify_labels: no task was given; pass {task: class names}")
    index: dict[str, int] = {}
    maps: dict[str, tuple[int, ...]] = {}
    for task, local_names in names.items():
        canonical = [canonical_name(name) for name in local_names]
        if not canonical or "" in canonical:
            raise ValueError(
                f"unify_labels: task {task!r} has class names {list(local_names)}; give every class a name"
            )
        for local, name in enumerate(canonical):
            if name in canonical[:local]:
                raise ValueError(
                    f"unify_labels: task {task!r} has two classes called {name!r} "
                    f"({local_names[canonical.index(name)]!r}, {local_names[local]!r}); rename one of them"
                )
        keys = canonical if union == "by_name" else [f"{task}/{name}" for name in canonical]
        maps[task] = tuple(index.setdefault(key, len(index)) for key in keys)
    return LabelSpace(classes=tuple(index), maps=maps)


def unify_heads(heads: Mapping[str, Tensor], space: LabelSpace) -> Float[Tensor, "C D"]:
    """One unit row a class of the union: the mean of its tasks' L2-normalised rows, normalised again (ours).

    heads[task] is [C_k, D], row order as the task's class names. Dtype and device follow the heads.

    Raises ValueError when tasks or shapes do not fit the space, or a row has no direction (zero, nan, inf, or two
    tasks' rows that cancel).
    """
    if set(heads) != set(space.maps):
        raise ValueError(
            f"unify_heads: heads for {sorted(heads)}, space has {sorted(space.maps)}; give one head a task"
        )
    first = heads[next(iter(space.maps))]
    total_CD = first.new_zeros(space.n_classes, first.shape[-1])
    for task, columns in space.maps.items():
        head = heads[task]
        if head.shape != (len(columns), first.shape[-1]):
            raise ValueError(
                f"unify_heads: the head of {task!r} has shape {tuple(head.shape)}, needs "
                f"{(len(columns), first.shape[-1])}; build it with one row a class name, all tasks of one width"
            )
        _check_direction(head, f"the head of {task!r}")
        total_CD = total_CD.index_add(0, torch.tensor(columns, device=head.device), normalize(head, dim=1))
    _check_direction(total_CD, "the mean head")
    return normalize(total_CD, dim=1)


def _check_direction(rows: Tensor, what: str) -> None:
    norm = torch.linalg.vector_norm(rows, dim=1)
    bad = ~(torch.isfinite(norm) & (norm > 1e-6))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"unify_heads: {what}, row {row}, has norm {norm[row].item()}; rebuild that class's head")
