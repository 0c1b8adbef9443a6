"""shard: sources of any kind become webdataset tars of verified images, with what is known of each beside them."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from bd_core.label_space import unify_labels
from pipeline.config import Resources, Spec
from pipeline.data.images import MAX_PIXELS, ImageFacts, inspect_image
from pipeline.data.items import SPLITS, Block, Item, Reject
from pipeline.data.source import Source
from pipeline.data.sources import AnySource
from pipeline.errors import BDMergeError, ConfigError, DataError, Faults
from pipeline.formats.schemas import REJECTS, SAMPLES
from pipeline.formats.shards import ShardSample, ShardWriter
from pipeline.formats.tables import write_table
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.store import Artefact

SAMPLE_ID_CHARS = 16
DEFAULT_TEMPLATES = ("a photo of a {}.",)


class TaskSpec(Spec):
    """One task: its images, and the prompts that make its zero-shot head."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]{0,30}$")
    source: AnySource
    templates: tuple[str, ...] = Field(default=DEFAULT_TEMPLATES, min_length=1, description="{} is the class name")

    @field_validator("templates")
    @classmethod
    def _hold_the_class_name(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            try:
                filled = template.format("class name")
            except (ValueError, KeyError, IndexError, AttributeError):
                filled = ""
            if "class name" not in filled:
                raise ValueError(f"{template!r} must hold {{}} once, for the class name, and no other braces")
        return templates


class ShardSpec(Spec):
    """How images are cut into shards and what is refused."""

    images_per_shard: int = Field(default=2048, ge=1)
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, description="a larger image is a reject, judged on its header")


class Shard(Stage):
    """Reads every source once. Bad images are counted rejects with a reason, never lost and never fatal."""

    name: ClassVar[str] = "shard"
    version: ClassVar[int] = 1
    what: ClassVar[str] = "verify images and pack them into webdataset shards"
    spec: ShardSpec

    def __init__(self, spec: ShardSpec, tasks: Sequence[TaskSpec], resources: Resources) -> None:
        super().__init__(spec, resources)
        self._tasks = tuple(tasks)

    def check(self) -> None:
        """Every source is there, has distinct class names, its labels among them, and images to train and to test."""
        faults = Faults()
        for task in self._tasks:
            with faults.collect():
                self._check_task(task)
        faults.raise_any()

    def _check_task(self, task: TaskSpec) -> None:
        try:
            classes = task.source.classes()
            blocks = task.source.blocks(self.spec.images_per_shard)
            unify_labels({task.name: classes})
        except BDMergeError as error:
            raise type(error)(f"task {task.name}: {error}") from None
        except ValueError as error:
            raise ConfigError(f"task {task.name}: {error}") from None
        check_labels(task.name, (item.label for block in blocks for item in block.items), classes)
        for split in SPLITS:
            if not any(block.split == split for block in blocks):
                raise ConfigError(
                    f"task {task.name}: no {split} images, and both splits are needed; add some, or change the split "
                    "(test_fraction, or the split column)"
                )

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit a block of a source, such as `mnist-train-00000`."""
        return [
            Unit(
                f"{task.name}-{block.id}",
                settings={"task": task.name, "classes": list(task.source.classes()), **block.settings},
                payload=(task.source, block),
            )
            for task in self._tasks
            for block in task.source.blocks(self.spec.images_per_shard)
        ]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write `images.tar`, `samples.parquet`, `classes.json` and `rejects.parquet`; rows sorted by sample_id."""
        source: Source
        block: Block
        source, block = unit.payload
        task, classes = unit.settings["task"], unit.settings["classes"]
        report = StageReport(0, 0, notes={"task": task, "split": block.split})
        kept: dict[str, tuple[Item, bytes, ImageFacts]] = {}
        rejects: list[tuple[str, str]] = []
        with report.span("decode"):
            for item, data in source.read(block):
                report.rows_in += 1
                facts = data if isinstance(data, Reject) else inspect_image(data, self.spec.max_pixels)
                if isinstance(data, Reject) or isinstance(facts, Reject):
                    assert isinstance(facts, Reject)
                    rejects.append((item.reference, facts.reason))
                    continue
                sample_id = hashlib.sha256(data).hexdigest()[:SAMPLE_ID_CHARS]
                if sample_id in kept:
                    rejects.append((item.reference, f"duplicate of {kept[sample_id][0].reference}"))
                    continue
                kept[sample_id] = (item, data, facts)
        report.rows_out, report.rejected = len(kept), len(rejects)
        report.notes["rejects"] = counted_rejects(reason for _, reason in rejects)
        with ShardWriter(out_dir / "images.tar") as writer:
            for sample_id, (_, data, facts) in sorted(kept.items()):
                writer.add(ShardSample(sample_id, facts.extension, data, {"task": task, "split": block.split}))
        write_table(out_dir / "samples.parquet", SAMPLES, _columns(kept, task, classes, block))
        write_table(out_dir / "rejects.parquet", REJECTS, reject_columns(rejects))
        (out_dir / "classes.json").write_text(json.dumps(classes) + "\n", encoding="utf-8")
        return report


def _columns(
    kept: dict[str, tuple[Item, bytes, ImageFacts]], task: str, classes: list[str], block: Block
) -> dict[str, list[Any]]:
    rows = [(sample_id, *kept[sample_id]) for sample_id in sorted(kept)]
    check_labels(task, (item.label for _, item, _, _ in rows), classes)
    index = {name: number for number, name in enumerate(classes)}
    return {
        "row": list(range(len(rows))),
        "sample_id": [sample_id for sample_id, _, _, _ in rows],
        "task": [task] * len(rows),
        "label": [None if item.label is None else index[item.label] for _, item, _, _ in rows],
        "split": [block.split] * len(rows),
        "width": [facts.width for _, _, _, facts in rows],
        "height": [facts.height for _, _, _, facts in rows],
        "source": [item.reference for _, item, _, _ in rows],
    }


def reject_columns(rejects: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """(source, reason) pairs as columns, sorted."""
    ordered = sorted(rejects)
    return {"source": [source for source, _ in ordered], "reason": [reason for _, reason in ordered]}


def check_labels(task: str, labels: Iterable[str | None], classes: Sequence[str]) -> None:
    """Raise DataError unless every label is one of `classes`; None is no label."""
    unknown = sorted({label for label in labels if label is not None} - set(classes))
    if unknown:
        raise DataError(
            f"task {task}: labels {', '.join(map(repr, unknown[:3]))} are none of its {len(classes)} classes; add them "
            "to class_names, or correct the labels"
        )


def counted_rejects(reasons: Iterable[str]) -> dict[str, int]:
    """{kind of reason: how often}, for the report's notes."""
    counts: dict[str, int] = {}
    for reason in reasons:
        kind = reason.split(":")[0].split(" of ")[0]
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def classes_of(shards: Sequence[Artefact]) -> dict[str, tuple[str, ...]]:
    """{task: class names}, in the tasks' order."""
    found: dict[str, tuple[str, ...]] = {}
    for shard in shards:
        found.setdefault(
            shard.report["notes"]["task"], tuple(json.loads(shard.file("classes.json").read_text(encoding="utf-8")))
        )
    return found


def check_splits(shards: Sequence[Artefact]) -> None:
    """Raise DataError unless every task has images in both splits that could be read: before anything is made of them.

    A folder may have held files for both, and all of one split may have been rejects.
    """
    tasks = dict.fromkeys(shard.report["notes"]["task"] for shard in shards)
    for task in tasks:
        for split in SPLITS:
            own = of_split(shards, split, task)
            if not sum(shard.report["rows_out"] for shard in own):
                rejected = sum(shard.report["rejected"] for shard in own)
                why = f"; {rejected} rejected, see {own[0].file('rejects.parquet')}" if rejected else ""
                raise DataError(f"task {task}: no {split} image could be read{why}; add some")


def of_split(shards: Sequence[Artefact], split: str, task: str | None = None) -> list[Artefact]:
    """The shards of one split (and task), in order."""
    return [
        shard
        for shard in shards
        if shard.report["notes"]["split"] == split and task in (None, shard.report["notes"]["task"])
    ]
