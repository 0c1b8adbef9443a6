"""base and experts, brought in from the user's checkpoints: verified, under open_clip's names, kept in the store."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from pipeline.backbones.open_clip import check_activation, check_fit, load_backbone, model_header, read_model_config
from pipeline.config import Resources, Spec, UserPath
from pipeline.errors import ConfigError, DataError, Faults
from pipeline.formats.checkpoints import (
    check_finite,
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
from pipeline.stages.shard import TaskSpec, check_splits, classes_of


class ImportSpec(Spec):
    """A user's own models: one base, one expert a task."""

    kind: Literal["checkpoints"] = "checkpoints"
    model: str = Field(description="an open_clip model such as ViT-B-32, or a JSON model configuration")
    base: UserPath = Field(description="theta_0: .safetensors, a torch state dict, or a Hugging Face CLIP folder")
    experts: dict[str, UserPath] = Field(description="task -> checkpoint of its expert, full or image tower alone")


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
        """The base's header fits the model and every expert's fits the base: all differences, before any work."""
        model, faults = model_header(self.spec.model), Faults()
        for path in (self.spec.base, *self.spec.experts.values()):
            with faults.collect():
                check_activation(self.spec.model, declared_activation(path), str(path))
        base: dict[str, Tensor] | None = None
        with faults.collect():
            base = read_header(self.spec.base)
            _check_base(base, model, self.spec)
        headers: dict[str, dict[str, Tensor]] = {}
        for task, path in self.spec.experts.items():
            with faults.collect():
                headers[task] = read_expert(path, base or model, header_only=True)
        if base is not None:
            with faults.collect():
                check_experts(visual_only(base), headers)
        faults.raise_any()

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit: the base. Shards count for their class names only."""
        check_splits(inputs["shard"])
        settings = {
            "model": list(read_model_config(self.spec.model)),
            "file": file_identity(self.spec.base),
            "classes": {task: list(names) for task, names in classes_of(inputs["shard"]).items()},
            "templates": {task.name: list(task.templates) for task in self._tasks},
        }
        return [Unit("base", settings=settings)]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Read, verify against the model, write."""
        state = read_checkpoint(self.spec.base)
        check_finite(state, f"base {self.spec.base}")
        _check_base(state, model_header(self.spec.model), self.spec)
        backbone = load_backbone(self.spec.model, state)
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
        check_finite(expert, f"expert {unit.id}, {path}")
        # Base and experts were compared in the dtype they were saved in; the store keeps both in the model's own.
        tower = visual_only(base)
        expert = {name: value.to(tower[name].dtype) if name in tower else value for name, value in expert.items()}
        check_experts(tower, {unit.id: expert})
        write_safetensors(out_dir / VISUAL, expert)
        return StageReport(rows_in=1, rows_out=1)


def _check_base(base: Mapping[str, Tensor], model: Mapping[str, Tensor], spec: ImportSpec) -> None:
    try:
        check_fit(base, model, spec.model)
    except DataError as error:
        raise DataError(f"base {spec.base}: {error}") from None


def file_identity(path: Path) -> list[list[Any]]:
    """[name, size, time of change] of a checkpoint's files: cheap, and another file never passes for it.

    Touching a file costs one import; equal weights give equal bytes in the store, and nothing after it runs again.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    if not path.exists():
        raise ConfigError(f"checkpoint {path} does not exist; correct the path")
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
