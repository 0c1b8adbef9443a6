"""embed: features and pooled tokens of the unlabelled images under the pretrained backbone."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from pipeline.config import Resources, Spec
from pipeline.formats.schemas import EMBEDDED, REJECTS, SAMPLES
from pipeline.formats.tables import read_table, write_table
from pipeline.formats.vectors import write_vectors
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.images import ShardImages, left_out, to_input_of
from pipeline.stages.models import open_backbone
from pipeline.stages.shard import counted_rejects, of_split, reject_columns
from pipeline.store import Artefact

IN_ANOTHER_SHARD = "duplicate: in another shard of the task"


class EmbedSpec(Spec):
    """Nothing to choose: what is embedded is the backbone's business."""


class Embed(Stage):
    """Embeds every train shard but those of unseen tasks; from here on nothing that fits sees a label."""

    name: ClassVar[str] = "embed"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("shard", "base")
    what: ClassVar[str] = "embed the auxiliary images with the pretrained backbone"
    spec: EmbedSpec

    def __init__(self, spec: EmbedSpec, resources: Resources, *, unseen: Sequence[str] = ()) -> None:
        super().__init__(spec, resources)
        self._unseen = frozenset(unseen)

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit a train shard, told which of its images other shards of the task have already."""
        seen = repeated(inputs["shard"])
        return [
            Unit(shard.unit, inputs=(shard, *inputs["base"]), settings={"repeated": seen[shard.unit]})
            for shard in of_split(inputs["shard"], "train")
            if shard.report["notes"]["task"] not in self._unseen
        ]

    def setup(self, unit: Unit) -> None:
        """Load the pretrained backbone."""
        self._backbone = open_backbone(unit.one("base"))
        self._backbone.model.to(self.device)

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write `features.npy`, `tokens.npy`, `samples.parquet` (row, sample_id, task) and `rejects.parquet`."""
        shard = unit.one("shard")
        repeated_ids = set(unit.settings["repeated"])
        samples = read_table(shard.file("samples.parquet"), SAMPLES, ["sample_id", "source"])
        report = StageReport(rows_in=len(samples), rows_out=0)
        with report.span("decode"):
            images = ShardImages.read(shard, to_input_of(self._backbone), without=repeated_ids)
        features, tokens = [], []
        with report.span("forward_backward"), torch.inference_mode():
            for start in range(0, len(images.sample_ids), self.resources.batch_size):
                pixels = images.pixels[start : start + self.resources.batch_size]
                feature, token = self._backbone.tokens(self._backbone.normalise(pixels.to(self.device)))
                features.append(feature.float().cpu().numpy())
                tokens.append(token.float().cpu().numpy())
        backbone = self._backbone
        empty = (np.zeros((0, backbone.embed_dim), np.float32), np.zeros((0, backbone.width), np.float32))
        write_vectors(out_dir / "features.npy", np.concatenate(features) if features else empty[0])
        write_vectors(out_dir / "tokens.npy", np.concatenate(tokens) if tokens else empty[1])
        source = dict(zip(samples["sample_id"].to_pylist(), samples["source"].to_pylist(), strict=True))
        rejects = [(source[name], images.faults.get(name, IN_ANOTHER_SHARD)) for name in left_out(source, images)]
        task, n_kept = shard.report["notes"]["task"], len(images.sample_ids)
        columns = {"row": range(n_kept), "sample_id": images.sample_ids, "task": [task] * n_kept}
        write_table(out_dir / "samples.parquet", EMBEDDED, columns)
        write_table(out_dir / "rejects.parquet", REJECTS, reject_columns(rejects))
        report.rows_out, report.rejected = n_kept, len(rejects)
        report.notes = {"task": task, "rejects": counted_rejects(reason for _, reason in rejects)}
        return report


def repeated(shards: Sequence[Artefact]) -> dict[str, list[str]]:
    """{shard: sample ids that another shard of its task has}, test shards first, then in order.

    An image that is in test and train is left out of train, so that no method is fitted on what it is judged by.
    """
    first: dict[tuple[str, str], str] = {}
    found: dict[str, list[str]] = {}
    for shard in (*of_split(shards, "test"), *of_split(shards, "train")):
        task = shard.report["notes"]["task"]
        ids = read_table(shard.file("samples.parquet"), SAMPLES, ["sample_id"])["sample_id"].to_pylist()
        found[shard.unit] = [name for name in ids if first.setdefault((task, name), shard.unit) != shard.unit]
    return found
