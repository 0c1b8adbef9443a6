"""score: evidence, uncertainty and the Adjacency Discrepancy Score of every edge, shard by shard.

Shape letters: A anchors (rows of the shard), N rows of the pool, C classes, E edges.
"""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from bd_core.dirichlet import iec, opinion
from bd_core.discrepancy import FACTORS, Discrepancy, Factor, Sharpness, negative_sharpness_share
from bd_core.head import EvidentialHead
from bd_core.neighbourhood import Neighbourhoods
from pipeline.config import Spec
from pipeline.errors import ConfigError
from pipeline.formats.schemas import SCORES
from pipeline.formats.tables import write_table
from pipeline.formats.vectors import write_vectors
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.anchor_scores import score_anchors
from pipeline.stages.fit_head import load_head
from pipeline.stages.neighbour_files import read_neighbourhoods
from pipeline.stages.pool import Pool

SIGNALS = ("sharpness", "divergence", "mean_ads")


class ScoreSpec(Spec):
    """The form of the ADS. `paper` inverts positives and negatives where Sharp < 0; `positive` is ours."""

    sharpness: Sharpness = "positive"
    factors: tuple[Factor, ...] = Field(default=FACTORS, min_length=1, description="leave one out for an ablation")
    max_negative_sharpness: float = Field(
        default=0.05, ge=0, le=1, description="with `paper`: refuse when more anchors than this have Sharp < 0; ours"
    )
    memory_mib: int = Field(
        default=512, ge=1, description="half for the evidence of a block of edges, half for the formulas"
    )


class Score(Stage):
    """Scores every edge of one shard's neighbourhoods."""

    name: ClassVar[str] = "score"
    version: ClassVar[int] = 3
    needs: ClassVar[tuple[str, ...]] = ("embed", "fit_head", "neighbours")
    what: ClassVar[str] = "score uncertainty and adjacency discrepancy"
    spec: ScoreSpec

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit for each neighbours unit."""
        return [Unit(part.unit, inputs=(*inputs["embed"], *inputs["fit_head"], part)) for part in inputs["neighbours"]]

    def setup(self, unit: Unit) -> None:
        """The head; evidence is made of those rows only that a shard has edges to."""
        self._pool = Pool.of(unit.inputs)
        self._head, _ = load_head(unit.one("fit_head"))

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write `scores.parquet` (a row an image) and `ads.npy` (a value an edge)."""
        part = unit.one("neighbours")
        rows = self._pool.rows_of(part.unit)
        graph = read_neighbourhoods(part.path)
        report = StageReport(rows_in=len(rows), rows_out=len(rows))
        with report.span("score"), torch.no_grad():
            anchor_alpha_AC = self._head(self._pool.features_at(np.arange(rows.start, rows.stop)))
            columns, found = scored(self._pool, self._head, anchor_alpha_AC, graph, self.spec)
        negative_share = negative_sharpness_share(found.sharpness)
        if self.spec.sharpness == "paper" and negative_share > self.spec.max_negative_sharpness:
            raise ConfigError(
                f"score.sharpness=paper: Sharp < 0 for {negative_share:.1%} of the anchors of {part.unit}, above "
                f"score.max_negative_sharpness {self.spec.max_negative_sharpness:.1%}; with it positives and negatives "
                "swap: use score.sharpness=positive, or lower fit_head.initial_confidence"
            )
        report.metrics = {"edges": float(len(found.ads)), "negative_sharpness_share": negative_share}
        write_table(out_dir / "scores.parquet", SCORES, {"row": list(rows), **columns})
        write_vectors(out_dir / "ads.npy", found.ads.float().numpy())
        return report


def scored(
    pool: Pool, head: EvidentialHead, anchor_alpha_AC: Tensor, graph: Neighbourhoods, spec: ScoreSpec
) -> tuple[dict[str, pa.Array], Discrepancy]:
    """Columns u, iec, sharpness, divergence, mean_ads, degree of the anchors, and what the middle three come from.

    An isolated anchor has none of those three: null, never zero.
    """
    found = score_anchors(
        pool,
        head,
        anchor_alpha_AC,
        graph,
        sharpness=spec.sharpness,
        factors=spec.factors,
        budget_bytes=spec.memory_mib * 2**20,
    )
    signals = {"u": opinion(anchor_alpha_AC).uncertainty, "iec": iec(anchor_alpha_AC)}
    signals |= {name: getattr(found, name) for name in SIGNALS}
    columns = {name: pa.array(values.numpy(), pa.float32(), from_pandas=True) for name, values in signals.items()}
    return columns | {"degree": pa.array(graph.degree.numpy(), pa.int64())}, found
