"""corrupt: the test images of every task, clean and at each corruption level, at the model's input size."""

import json
import re
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field, field_validator

from pipeline.config import Spec
from pipeline.data.corruptions import DEFAULT, LEVELS, check_corruptions, corrupt, corruption_seed
from pipeline.formats.schemas import REJECTS, SAMPLES, TEST_IMAGES
from pipeline.formats.tables import read_table, write_table
from pipeline.formats.vectors import write_vectors
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.embed import IN_ANOTHER_SHARD, repeated
from pipeline.stages.images import ShardImages, left_out
from pipeline.stages.models import input_transform_of
from pipeline.stages.shard import counted_rejects, of_split, reject_columns

CLEAN = "clean"


class CorruptSpec(Spec):
    """Levels and corruptions. The paper names neither; severities 1, 3, 5 of this list are ours."""

    corruptions: tuple[str, ...] = Field(default=DEFAULT, min_length=1)
    levels: dict[str, Annotated[int, Field(ge=1, le=5)]] = Field(
        default=LEVELS, min_length=1, description="level -> ImageNet-C severity"
    )
    every_corruption: bool = Field(
        default=False, description="each image under every corruption; otherwise under one, drawn by seed and image"
    )
    seed: int = Field(default=0, ge=0, description="of the corruptions; the run's own seed does not change them")

    @field_validator("levels")
    @classmethod
    def _named(cls, levels: dict[str, int]) -> dict[str, int]:
        # The names are part of the units' names, so of their directories'.
        for name in levels:
            if name == CLEAN or not re.fullmatch(r"[A-Za-z0-9_]{1,20}", name):
                raise ValueError(f"{name!r} cannot be a level's name; take letters, digits and _, and not {CLEAN!r}")
        return levels


class Corrupt(Stage):
    """Makes the images that every model is judged on, once."""

    name: ClassVar[str] = "corrupt"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("shard", "base")
    what: ClassVar[str] = "make the clean and corrupted test images"
    spec: CorruptSpec

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit a test shard and level, such as `mnist-test-00000-L2`. Only the base's preprocessing counts."""
        (base,) = inputs["base"]
        described = json.loads(base.file("backbone.json").read_text(encoding="utf-8"))
        check_corruptions(self.spec.corruptions, described["input_size"])
        settings = {"preprocess": described["preprocess"], "input_size": described["input_size"]}
        test = of_split(inputs["shard"], "test")
        seen = repeated(inputs["shard"])
        return [
            Unit(
                f"{shard.unit}-{level}",
                inputs=(shard,),
                settings={"level": level, "severity": severity, "repeated": seen[shard.unit], **settings},
            )
            for shard in test
            for level, severity in {CLEAN: 0, **self.spec.levels}.items()
        ]

    def hashed_spec(self) -> dict[str, object]:
        """The spec without the levels: each unit's settings name its own."""
        return {name: value for name, value in super().hashed_spec().items() if name != "levels"}

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write `images.npy` uint8 [n, S, S, 3], `samples.parquet` (sample_id, task, label, corruption), rejects."""
        shard = unit.one("shard")
        table = read_table(shard.file("samples.parquet"), SAMPLES, ["sample_id", "label", "source"])
        ids = table["sample_id"].to_pylist()
        labels = dict(zip(ids, table["label"].to_pylist(), strict=True))
        source = dict(zip(ids, table["source"].to_pylist(), strict=True))
        side = unit.settings["input_size"]
        report = StageReport(rows_in=len(labels), rows_out=0)
        with report.span("decode"):
            images = ShardImages.read(
                shard, input_transform_of(unit.settings["preprocess"]), without=set(unit.settings["repeated"])
            )
        made: list[np.ndarray] = []
        rows: list[tuple[str, int | None, str]] = []
        with report.span("corrupt"):
            for sample_id, pixels in zip(images.sample_ids, images.pixels.numpy(), strict=True):
                for corruption in self._corruptions_of(sample_id, unit.settings["severity"]):
                    severity = unit.settings["severity"]
                    seed = corruption_seed(self.spec.seed, sample_id, corruption, severity)
                    made.append(corrupt(pixels, corruption, severity, seed) if severity else pixels)
                    rows.append((sample_id, labels[sample_id], corruption))
        # A shard of nothing but repeated images is as good as any other: it adds no row.
        write_vectors(out_dir / "images.npy", np.stack(made) if made else np.zeros((0, side, side, 3), np.uint8))
        columns = {
            "sample_id": [row[0] for row in rows],
            "task": [shard.report["notes"]["task"]] * len(rows),
            "label": [row[1] for row in rows],
            "corruption": [row[2] for row in rows],
        }
        write_table(out_dir / "samples.parquet", TEST_IMAGES, columns)
        rejects = [(source[name], images.faults.get(name, IN_ANOTHER_SHARD)) for name in left_out(labels, images)]
        write_table(out_dir / "rejects.parquet", REJECTS, reject_columns(rejects))
        report.rows_out, report.rejected = len(images.sample_ids), len(rejects)
        report.notes = {
            "task": shard.report["notes"]["task"],
            "level": unit.settings["level"],
            "rejects": counted_rejects(reason for _, reason in rejects),
        }
        return report

    def _corruptions_of(self, sample_id: str, severity: int) -> tuple[str, ...]:
        if not severity:
            return ("none",)
        if self.spec.every_corruption:
            return self.spec.corruptions
        # The image draws one, the same at every level, so that levels differ in severity alone.
        drawn = torch.Generator().manual_seed(int(sample_id, 16) % 2**62 + self.spec.seed)
        return (self.spec.corruptions[int(torch.randint(len(self.spec.corruptions), (), generator=drawn))],)
