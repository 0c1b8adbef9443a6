"""base and experts, brought in from the user's checkpoints: verified, under open_clip's names, kept in the store."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from pipeline.backbones.open_clip import check_activation, load_backbone, read_model_config
from pipeline.config import Resources, Spec
from pipeline.errors import ConfigError
from pipeline.formats.checkpoints import (
    declared_activation,
    read_checkpoint,
    read_expert,
    read_header,
    write_safetensors,
)
from pipeline.formats.clip_names import visual_only
from pipeline.formats.headers import check_experts
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.base_files import write_base
from pipeline.stages.models import VISUAL
from pipeline.stages.shard import TaskSpec, classes_of


class ImportSpec(Spec):
    """A user's own models: one base, one expert a task."""

    kind: Literal["checkpoints"] = "checkpoints"
    model: str = Field(description="an open_clip model such as ViT-B-32, or a JSON model configuration")
    base: Path = Field(description="theta_0: .safetensors, a torch state dict, or a Hugging Face CLIP folder")
    experts: dict[str, Path] = Field(description="task -> checkpoint of its expert, full or image tower alone")


class _Imported(Stage):
    """What both stages share: the spec and the tasks."""

    spec: ImportSpec

    def __init__(self, spec: ImportSpec, tasks: Sequence[TaskSpec], resources: Resources) -> None:
        super().__init__(spec, resources)
        self._tasks = tuple(tasks)

    def hashed_spec(self) -> dict[str, Any]:
        """Only what says which model it is; the files count through the units' settings."""
        return {"kind": self.spec.kind}


class ImportBase(_Imported):
    """Brings in theta_0 and makes its zero-shot heads."""

    name: ClassVar[str] = "base"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("shard",)
    what: ClassVar[str] = "import and verify the base checkpoint"

    def check(self) -> None:
        """The base's header fits the model and every expert's fits the base: the differences, before any work."""
        for path in (self.spec.base, *self.spec.experts.values()):
            check_activation(self.spec.model, declared_activation(path), str(path))
        base = read_header(self.spec.base)
        headers = {task: read_expert(path, base, header_only=True) for task, path in self.spec.experts.items()}
        check_experts(visual_only(base), headers)

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit: the base. Shards count for their class names only."""
        settings = {
            "model": list(read_model_config(self.spec.model)),
            "file": file_identity(self.spec.base),
            "classes": {task: list(names) for task, names in classes_of(inputs["shard"]).items()},
            "templates": {task.name: list(task.templates) for task in self._tasks},
        }
        return [Unit("base", settings=settings)]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Read, verify against the model, write."""
        backbone = load_backbone(self.spec.model, read_checkpoint(self.spec.base))
        classes: Mapping[str, Sequence[str]] = unit.settings["classes"]
        ordered = {task.name: classes[task.name] for task in self._tasks}
        heads = {task.name: backbone.class_heads(ordered[task.name], task.templates) for task in self._tasks}
        write_base(out_dir, backbone, heads, ordered, model_config=self.spec.model)
        return StageReport(rows_in=1, rows_out=1)


class ImportExperts(_Imported):
    """Brings in theta_1 .. theta_K."""

    name: ClassVar[str] = "experts"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("base",)
    what: ClassVar[str] = "import and verify the experts' checkpoints"

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit a task."""
        return [
            Unit(
                task.name,
                inputs=tuple(inputs["base"]),
                settings={"file": file_identity(self.spec.experts[task.name])},
            )
            for task in self._tasks
        ]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Read, compare with the base, write the image tower."""
        path = self.spec.experts[unit.id]
        base = read_checkpoint(unit.one("base").file("model.safetensors"))
        expert = read_expert(path, base)
        check_experts(visual_only(base), {unit.id: expert})
        write_safetensors(out_dir / VISUAL, expert)
        return StageReport(rows_in=1, rows_out=1)


def file_identity(path: Path) -> list[list[Any]]:
    """[name, size, time of change] of a checkpoint's files: cheap, and another file never passes for it.

    Touching a file costs one import; equal weights give equal bytes in the store, and nothing after it runs again.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    if not path.exists():
        raise ConfigError(f"checkpoint {path} does not exist; correct the path")
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
