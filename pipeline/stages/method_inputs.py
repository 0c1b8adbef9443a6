"""What methods ask for beside checkpoints: Gram matrices, unlabelled batches, labelled validation images.

Shape letters: B batch, C classes, K experts, S input side.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bd_core.metrics import accuracy
from pipeline.backbones.open_clip import Backbone
from pipeline.errors import DataError
from pipeline.formats.schemas import EMBEDDED, SAMPLES
from pipeline.formats.tables import read_table
from pipeline.stage import Unit
from pipeline.stages.activations import GRAMS, SQUARES, Stacked
from pipeline.stages.fit_head import class_heads
from pipeline.stages.images import PoolImages
from pipeline.stages.models import Experts, open_backbone
from pipeline.stages.pool import Pool
from pipeline.training.loop import step_generator

IMAGES_A_PASS = 64  # fixed, so that no option of speed changes the last bit of a logit


class MethodInputs:
    """Opens what is asked for and no more; a context that closes the images."""

    def __init__(self, unit: Unit, experts: Experts, seed: int) -> None:
        self._unit, self._experts, self._seed = unit, experts, seed

    def given(self, names: frozenset[str]) -> dict[str, Any]:
        """The arguments of these names, of those that are made here."""
        make: dict[str, Callable[[], Any]] = {
            "grams": lambda: self._stacked(GRAMS),
            "squares": lambda: self._stacked(SQUARES),
            "logits": lambda: self.logits,
            "features": lambda: self.features,
            "batches": self.batches,
            "validate": self.validation,
        }
        return {name: make[name]() for name in sorted(names & make.keys())}

    def logits(self, state: Mapping[str, Tensor], pixels_BSS3: Tensor, task: str) -> Tensor:
        """What the image tower with exactly this state says of the images, by the task's zero-shot head: [B, C]."""
        directions = nn.functional.normalize(self.features(state, pixels_BSS3), dim=-1)
        return self.backbone.logit_scale * directions @ self.heads[task].T

    def features(self, state: Mapping[str, Tensor], pixels_BSS3: Tensor) -> Tensor:
        """Features [B, D] of the image tower with this state, as they leave it."""
        features: Tensor = functional_call(self.backbone.visual, dict(state), (self.backbone.normalise(pixels_BSS3),))
        return features

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Without end: {task: uint8 [B, S, S, 3] of its unlabelled images}, the same for the same seed."""
        step, batch_per_task = 0, self._unit.settings["batch_per_task"]
        while True:
            generator = step_generator(self._seed, step)
            yield {
                task: self.images[rows[torch.randint(len(rows), (batch_per_task,), generator=generator)]]
                for task, rows in self.rows.items()
            }
            step += 1

    def validation(self) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """The function from a merged state to its accuracy on each task's validation images [K]."""
        drawn = self._validation_rows()
        shown = {task: (self.images[rows], labels) for task, (rows, labels) in drawn.items()}

        @torch.inference_mode()
        def validate(state: Mapping[str, Tensor]) -> Tensor:
            found = []
            for task, (pixels, labels) in shown.items():
                parts = [self.logits(state, part, task).argmax(-1) for part in torch.split(pixels, IMAGES_A_PASS)]
                found.append(accuracy(torch.cat(parts), labels))
            return torch.tensor(found)

        return validate

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if "images" in self.__dict__:
            self.images.__exit__()

    @cached_property
    def backbone(self) -> Backbone:
        """The pretrained model."""
        return open_backbone(self._unit.one("base"))

    @cached_property
    def heads(self) -> dict[str, Tensor]:
        """{task: zero-shot head [C, D]} of the experts' tasks."""
        heads = class_heads(self._unit.one("base"))
        return {task: heads[task] for task in self._experts.tasks}

    @cached_property
    def pool(self) -> Pool:
        """The auxiliary images' rows."""
        return Pool.of(self._unit.inputs)

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """{task: its rows of the pool}."""
        tasks = self.pool.tasks()
        return {own: torch.tensor([r for r, task in enumerate(tasks) if task == own]) for own in self._experts.tasks}

    @cached_property
    def images(self) -> PoolImages:
        """The auxiliary images, decoded when they are asked for."""
        return PoolImages(self._unit.payload, self.pool, self.backbone)

    def _stacked(self, name: str) -> Stacked:
        return Stacked(self._unit.of("activations"), self._experts.tasks, name)

    def _validation_rows(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{task: rows of the pool and their labels}. The pool holds train images alone, none that a test shard has."""
        labels = self._labels()
        generator = torch.Generator().manual_seed(self._seed)
        drawn: dict[str, tuple[Tensor, Tensor]] = {}
        for task, rows in self.rows.items():
            labelled = [int(row) for row in rows if labels[int(row)] is not None]
            if not labelled:
                raise DataError(
                    f"task {task} has no labelled train image, and {self._unit.id} validates on some; label a few, "
                    f"or leave baselines.methods.{self._unit.id} out"
                )
            order = torch.randperm(len(labelled), generator=generator)[: self._unit.settings["validation_per_task"]]
            chosen = torch.tensor(labelled)[order.sort().values]
            drawn[task] = chosen, torch.tensor([labels[int(row)] for row in chosen])
        return drawn

    def _labels(self) -> list[int | None]:
        """The label of every row of the pool."""
        known: dict[str, dict[str, int | None]] = {}
        for shard in self._unit.of("shard"):
            table = read_table(shard.file("samples.parquet"), SAMPLES, ["sample_id", "label"])
            known[shard.unit] = dict(zip(table["sample_id"].to_pylist(), table["label"].to_pylist(), strict=True))
        ids: Sequence[tuple[str, str]] = [
            (unit.unit, name)
            for unit in self.pool.units
            for name in read_table(unit.file("samples.parquet"), EMBEDDED, ["sample_id"])["sample_id"].to_pylist()
        ]
        return [known[unit][name] for unit, name in ids]
