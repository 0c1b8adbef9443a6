"""The committed base and experts, opened: what every stage that runs a model begins with."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from bd_core.layer_groups import LayerGroups, layer_groups
from bd_core.task_vectors import TaskVectors, task_vectors
from pipeline.backbones.open_clip import Backbone, input_transform, load_backbone
from pipeline.data.images import decode_image
from pipeline.store import Artefact

VISUAL = "visual.safetensors"


def open_backbone(base: Artefact) -> Backbone:
    """The backbone theta_0 that the base unit holds."""
    model = json.loads(base.file("backbone.json").read_text(encoding="utf-8"))["model"]
    place = base.file(model) if model.endswith(".json") else model
    return load_backbone(place, load_file(base.file("model.safetensors")))


def visual_state(base: Artefact) -> dict[str, Tensor]:
    """theta_0 of the image tower, names without `visual.`."""
    full = load_file(base.file("model.safetensors"))
    return {name.removeprefix("visual."): value for name, value in full.items() if name.startswith("visual.")}


@dataclass(frozen=True)
class Experts:
    """theta_0 and theta_1 .. theta_K of the image tower, in the order of the tasks."""

    base_state: dict[str, Tensor]
    states: list[dict[str, Tensor]]
    tasks: tuple[str, ...]

    @classmethod
    def of(cls, artefacts: Sequence[Artefact]) -> Self:
        """The experts among `artefacts`, beside the base among them; a task without an expert is not merged."""
        base = next(artefact for artefact in artefacts if artefact.stage == "base")
        experts = {artefact.unit: artefact for artefact in artefacts if artefact.stage == "experts"}
        every_task = json.loads(base.file("classes.json").read_text(encoding="utf-8"))
        tasks = tuple(task for task in every_task if task in experts)
        return cls(visual_state(base), [load_file(experts[task].file(VISUAL)) for task in tasks], tasks)

    @property
    def count(self) -> int:
        """K."""
        return len(self.states)

    def vectors(self) -> TaskVectors:
        """The K task vectors."""
        return task_vectors(self.base_state, self.states)

    @property
    def groups(self) -> LayerGroups:
        """The layer groups of the image tower."""
        return layer_groups(self.base_state)


def input_transform_of(preprocess: Mapping[str, Any]) -> Callable[[bytes], NDArray[np.uint8]]:
    """Encoded bytes to uint8 [S, S, 3] under this preprocessing; no weights are needed."""
    transform = input_transform(preprocess)
    return lambda data: np.array(transform(decode_image(data)), dtype=np.uint8)
