"""pairs: M+ and M- of every anchor, from the ADS and epsilon, shard by shard."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from bd_core.discrepancy import split_pairs
from pipeline.config import Spec
from pipeline.formats.schemas import PAIRS
from pipeline.formats.tables import write_table
from pipeline.formats.vectors import read_vectors
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.neighbour_files import read_neighbourhoods
from pipeline.stages.pool import Pool


class PairsSpec(Spec):
    """Nothing to choose: epsilon is fixed by the threshold stage."""


class Pairs(Stage):
    """Splits one shard's edges into positives (d < epsilon) and negatives (d >= epsilon)."""

    name: ClassVar[str] = "pairs"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("embed", "neighbours", "score", "threshold")
    what: ClassVar[str] = "split neighbours into contrastive pairs"
    spec: PairsSpec

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit for each score unit, with the neighbours unit it scored."""
        graphs = {part.unit: part for part in inputs["neighbours"]}
        pool = Pool.of(inputs["embed"])
        return [
            Unit(
                part.unit,
                inputs=(graphs[part.unit], part, *inputs["threshold"]),
                settings={"first_row": pool.rows_of(part.unit).start},
            )
            for part in inputs["score"]
        ]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write `pairs.parquet`: anchor and other are global rows of the pool."""
        graph = read_neighbourhoods(unit.one("neighbours").path)
        ads_E = torch.from_numpy(read_vectors(unit.one("score").file("ads.npy")).copy())
        epsilon = json.loads(unit.one("threshold").file("epsilon.json").read_text(encoding="utf-8"))["epsilon"]
        pairs = split_pairs(ads_E, graph, epsilon)
        positive = pairs.positive.numpy()
        columns = {
            "anchor": pairs.anchor.numpy() + unit.settings["first_row"],
            "other": pairs.other.numpy(),
            "kind": np.where(positive, "positive", "negative"),
            "cosine": graph.cosine.numpy(),
            "ads": ads_E.numpy(),
        }
        write_table(out_dir / "pairs.parquet", PAIRS, columns)
        return StageReport(
            rows_in=len(ads_E), rows_out=len(ads_E), metrics={"positives": float(positive.sum()), "edges": len(ads_E)}
        )
