"""base and experts, trained on the spot: the small models of the demo, by the protocol of the task-vector work.

theta_0 is a CLIP trained for a few steps on the captions of all tasks, a weak generalist whose zero-shot heads come
from prompts. Each expert is theta_0's image tower fine-tuned on one task against its frozen text head.
These two stages read labels, as whoever made the experts did; no stage after them that fits anything does.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.backbones.open_clip import Backbone, load_backbone, read_model_config
from pipeline.config import Resources, Spec
from pipeline.errors import ConfigError, Faults
from pipeline.formats.checkpoints import write_safetensors
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.base_files import write_base
from pipeline.stages.fit_head import class_heads
from pipeline.stages.images import LabelledImages
from pipeline.stages.models import VISUAL, open_backbone
from pipeline.stages.shard import TaskSpec, check_splits, classes_of
from pipeline.store import Store
from pipeline.training.context import LocalContext
from pipeline.training.history import write_history
from pipeline.training.loop import optimise


class TrainSpec(Spec):
    """How the demo's models are trained. All of it is ours."""

    kind: Literal["trained"] = "trained"
    model: Path = Field(description="an open_clip model configuration (JSON)")
    base_steps: int = Field(default=300, ge=1)
    base_batch: int = Field(default=128, ge=2)
    base_learning_rate: float = Field(default=1e-3, gt=0)
    expert_steps: int = Field(default=300, ge=1)
    expert_batch: int = Field(default=64, ge=2)
    expert_learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    checkpoint_every: int = Field(default=50, ge=1)


class _Trained(Stage):
    """What both stages share: the spec, and the model configuration as part of the key."""

    spec: TrainSpec

    def __init__(self, spec: TrainSpec, tasks: Sequence[TaskSpec], resources: Resources, seed: int) -> None:
        super().__init__(spec, resources, seed)
        self._tasks = tuple(tasks)

    def check(self) -> None:
        """The model configuration can be read, and every task has images whose labels are known."""
        faults = Faults()
        with faults.collect():
            read_model_config(self.spec.model)
        for task in self._tasks:
            with faults.collect():
                _check_labelled(task)
        faults.raise_any()

    def _optimise(self, module: nn.Module, loss: Any, steps: int, rate: float, out_dir: Path) -> list[dict[str, float]]:
        assert self.seed is not None
        return optimise(
            module,
            loss,
            steps=steps,
            learning_rate=rate,
            seed=self.seed,
            context=LocalContext(Store.state_beside(out_dir)),
            weight_decay=self.spec.weight_decay,
            warmup_steps=min(50, steps // 10),
            cosine=True,
            clip_norm=1.0,
            checkpoint_every=self.spec.checkpoint_every,
        )


def _check_labelled(task: TaskSpec) -> None:
    items = [item for block in task.source.blocks(2**31) if block.split == "train" for item in block.items]
    if items and all(item.label is None for item in items):
        raise ConfigError(
            f"task {task.name}: no train image has a label, and models.kind=trained trains on them; put the images in "
            "one folder a class, or bring checkpoints of your own (models.kind=checkpoints)"
        )


class TrainBase(_Trained):
    """Trains theta_0 and makes its zero-shot heads."""

    name: ClassVar[str] = "base"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("shard",)
    what: ClassVar[str] = "train the small CLIP that is theta_0"

    def hashed_spec(self) -> dict[str, Any]:
        """The base's part of the spec, the content of the model configuration, and the prompts."""
        spec = {k: v for k, v in self.spec.model_dump(mode="json").items() if not k.startswith("expert_")}
        spec["model"] = [self.spec.model.name, json.loads(self.spec.model.read_text(encoding="utf-8"))]
        return {**spec, "templates": {task.name: list(task.templates) for task in self._tasks}}

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit: the base."""
        check_splits(inputs["shard"])
        train = tuple(shard for shard in inputs["shard"] if shard.report["notes"]["split"] == "train")
        return [Unit("base", inputs=train)]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Train, then write model, heads, classes and history."""
        report = StageReport(0, 0)
        with report.span("load"):
            backbone = load_backbone(self.spec.model, seed=self.seed or 0)
        classes = classes_of(unit.inputs)
        captions = sorted({name for names in classes.values() for name in names})
        class_index = {
            task: {label: captions.index(name) for label, name in enumerate(names)} for task, names in classes.items()
        }
        with report.span("decode"):
            images = LabelledImages(unit.inputs, backbone, class_index)
        report.rows_in = report.rows_out = len(images)
        templates = sorted({template for task in self._tasks for template in task.templates})
        model: Any = backbone.model
        model.train()

        def step_loss(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
            """Every image against the captions of all classes, each in one template drawn for this step."""
            pixels, labels = images.draw(self.spec.base_batch, generator)
            template = templates[int(torch.randint(len(templates), (), generator=generator))]
            text = nn.functional.normalize(
                model.encode_text(backbone.tokenise([template.format(name) for name in captions])), dim=-1
            )
            features = nn.functional.normalize(model.visual(backbone.normalise(pixels)), dim=-1)
            logits = model.logit_scale.exp().clamp(max=100.0) * features @ text.T
            loss = nn.functional.cross_entropy(logits, labels)
            return loss, {"accuracy": (logits.argmax(-1) == labels).float().mean().item()}

        with report.span("forward_backward"):
            history = self._optimise(model, step_loss, self.spec.base_steps, self.spec.base_learning_rate, out_dir)
        model.eval()
        report.metrics = {"final_loss": history[-1]["loss"], "train_accuracy": history[-1]["accuracy"]}
        with report.span("forward_backward"):
            heads = {t.name: backbone.class_heads(classes[t.name], t.templates) for t in self._tasks}
        write_base(out_dir, backbone, heads, classes, model_config=self.spec.model)
        write_history(out_dir / "history.parquet", history)
        return report


class TrainExperts(_Trained):
    """Fine-tunes one image tower a task, text heads frozen."""

    name: ClassVar[str] = "experts"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("shard", "base")
    what: ClassVar[str] = "fine-tune one expert for each task"

    def hashed_spec(self) -> dict[str, Any]:
        """The experts' part of the spec; the model comes in through the base."""
        spec = self.spec.model_dump(mode="json")
        return {name: spec[name] for name in ("expert_steps", "expert_batch", "expert_learning_rate", "weight_decay")}

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit a task."""
        return [
            Unit(
                task.name,
                inputs=(
                    *inputs["base"],
                    *(
                        shard
                        for shard in inputs["shard"]
                        if shard.report["notes"]["task"] == task.name and shard.report["notes"]["split"] == "train"
                    ),
                ),
            )
            for task in self._tasks
        ]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Fine-tune, then write the image tower and the history."""
        report = StageReport(0, 0)
        with report.span("load"):
            backbone: Backbone = open_backbone(unit.one("base"))
        head_CD = class_heads(unit.one("base"))[unit.id]
        names = classes_of(unit.of("shard"))[unit.id]
        class_index = {unit.id: {label: label for label in range(len(names))}}
        with report.span("decode"):
            images = LabelledImages(unit.of("shard"), backbone, class_index)
        report.rows_in = report.rows_out = len(images)
        visual = backbone.visual.train()

        def step_loss(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
            pixels, labels = images.draw(self.spec.expert_batch, generator)
            features = nn.functional.normalize(visual(backbone.normalise(pixels)), dim=-1)
            logits = backbone.logit_scale * features @ head_CD.T
            loss = nn.functional.cross_entropy(logits, labels)
            return loss, {"accuracy": (logits.argmax(-1) == labels).float().mean().item()}

        with report.span("forward_backward"):
            history = self._optimise(visual, step_loss, self.spec.expert_steps, self.spec.expert_learning_rate, out_dir)
        report.metrics = {"final_loss": history[-1]["loss"], "train_accuracy": history[-1]["accuracy"]}
        write_safetensors(out_dir / VISUAL, visual.state_dict())
        write_history(out_dir / "history.parquet", history)
        return report
