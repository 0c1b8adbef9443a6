"""corrupt: the test images of every task, clean and at each corruption level, at the model's input size."""

import json
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field

from pipeline.config import Spec
from pipeline.data.corruptions import DEFAULT, LEVELS, MIN_SIDE, check_corruptions, corrupt, corruption_seed
from pipeline.errors import DataError
from pipeline.formats.schemas import SAMPLES, TEST_IMAGES
from pipeline.formats.tables import read_table, write_table
from pipeline.formats.vectors import write_vectors
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.embed import repeated
from pipeline.stages.images import ShardImages
from pipeline.stages.models import input_transform_of
from pipeline.stages.shard import of_split

CLEAN = "clean"


class CorruptSpec(Spec):
    """Levels and corruptions. The paper names neither; severities 1, 3, 5 of this list are ours."""

    corruptions: tuple[str, ...] = Field(default=DEFAULT, min_length=1)
    levels: dict[str, Annotated[int, Field(ge=1, le=5)]] = Field(
        default=LEVELS, description="level -> ImageNet-C severity"
    )
    every_corruption: bool = Field(
        default=False, description="each image under every corruption; otherwise under one, drawn by seed and image"
    )
    seed: int = Field(default=0, ge=0, description="of the corruptions; the run's own seed does not change them")


class Corrupt(Stage):
    """Makes the images that every model is judged on, once."""

    name: ClassVar[str] = "corrupt"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("shard", "base")
    what: ClassVar[str] = "make the clean and corrupted test images"
    spec: CorruptSpec

    def check(self) -> None:
        """Every corruption is known."""
        check_corruptions(self.spec.corruptions, MIN_SIDE)

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit a test shard and level, such as `mnist-test-00000-L2`. Only the base's preprocessing counts."""
        (base,) = inputs["base"]
        described = json.loads(base.file("backbone.json").read_text(encoding="utf-8"))
        check_corruptions(self.spec.corruptions, described["input_size"])
        settings = {"preprocess": described["preprocess"], "input_size": described["input_size"]}
        test = of_split(inputs["shard"], "test")
        tasks = {shard.report["notes"]["task"] for shard in inputs["shard"]}
        without = sorted(tasks - {shard.report["notes"]["task"] for shard in test if shard.report["rows_out"]})
        if without:
            raise DataError(f"tasks {', '.join(without)} have no test images, so nothing can be measured; add some")
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
        """Write `images.npy` uint8 [n, S, S, 3] and `samples.parquet` (sample_id, task, label, corruption)."""
        shard = unit.one("shard")
        table = read_table(shard.file("samples.parquet"), SAMPLES, ["sample_id", "label"])
        labels = dict(zip(table["sample_id"].to_pylist(), table["label"].to_pylist(), strict=True))
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
        write_vectors(out_dir / "images.npy", np.stack(made))
        columns = {
            "sample_id": [row[0] for row in rows],
            "task": [shard.report["notes"]["task"]] * len(rows),
            "label": [row[1] for row in rows],
            "corruption": [row[2] for row in rows],
        }
        write_table(out_dir / "samples.parquet", TEST_IMAGES, columns)
        report.rows_out, report.rejected = len(images.sample_ids), len(labels) - len(images.sample_ids)
        report.notes = {"task": shard.report["notes"]["task"], "level": unit.settings["level"]}
        return report

    def _corruptions_of(self, sample_id: str, severity: int) -> tuple[str, ...]:
        if not severity:
            return ("none",)
        if self.spec.every_corruption:
            return self.spec.corruptions
        # The image draws one, the same at every level, so that levels differ in severity alone.
        drawn = torch.Generator().manual_seed(int(sample_id, 16) % 2**62 + self.spec.seed)
        return (self.spec.corruptions[int(torch.randint(len(self.spec.corruptions), (), generator=drawn))],)
