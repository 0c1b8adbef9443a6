"""score: evidence, uncertainty and the Adjacency Discrepancy Score of every edge, shard by shard.

Shape letters: A anchors (rows of the shard), N rows of the pool, C classes, E edges.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from bd_core.dirichlet import iec, opinion
from bd_core.discrepancy import discrepancy, negative_sharpness_share
from bd_core.head import EvidentialHead
from bd_core.huge_pages import empty
from bd_core.neighbourhood import Neighbourhoods
from pipeline.config import Spec
from pipeline.errors import ConfigError
from pipeline.formats.schemas import SCORES
from pipeline.formats.tables import write_table
from pipeline.formats.vectors import write_vectors
from pipeline.neighbourhoods.csr import rows_of
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.fit_head import load_head
from pipeline.stages.neighbour_files import read_neighbourhoods
from pipeline.stages.pool import Pool

Factor = Literal["sharpness", "divergence", "conflict"]
ROWS_AT_ONCE = 8192  # whose evidence is made together
SIGNALS = ("sharpness", "divergence", "mean_ads")


class ScoreSpec(Spec):
    """The form of the ADS. `paper` inverts positives and negatives where Sharp < 0; `positive` is ours."""

    sharpness: Literal["paper", "positive"] = "positive"
    factors: tuple[Factor, ...] = Field(
        default=("sharpness", "divergence", "conflict"), min_length=1, description="leave one out for an ablation"
    )
    max_negative_sharpness: float = Field(
        default=0.05, ge=0, le=1, description="with `paper`: refuse when more anchors than this have Sharp < 0; ours"
    )
    memory_mib: int = Field(
        default=512, ge=1, description="half for the evidence of a block of edges, half for the formulas"
    )


class Score(Stage):
    """Scores every edge of one shard's neighbourhoods."""

    name: ClassVar[str] = "score"
    version: ClassVar[int] = 2
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
            columns, ads_E, negative_share = score_anchors(self._pool, self._head, anchor_alpha_AC, graph, self.spec)
        if self.spec.sharpness == "paper" and negative_share > self.spec.max_negative_sharpness:
            raise ConfigError(
                f"score.sharpness=paper: Sharp < 0 for {negative_share:.1%} of the anchors of {part.unit}, above "
                f"score.max_negative_sharpness {self.spec.max_negative_sharpness:.1%}; with it positives and negatives "
                "swap: use score.sharpness=positive, or lower fit_head.initial_confidence"
            )
        report.metrics = {"edges": float(len(ads_E)), "negative_sharpness_share": negative_share}
        write_table(out_dir / "scores.parquet", SCORES, {"row": list(rows), **columns})
        write_vectors(out_dir / "ads.npy", ads_E.numpy())
        return report


def score_anchors(
    pool: Pool, head: EvidentialHead, anchor_alpha_AC: Tensor, graph: Neighbourhoods, spec: ScoreSpec
) -> tuple[dict[str, pa.Array], Tensor, float]:
    """Columns (u, iec, sharpness, divergence, mean_ads, degree) of the anchors, ADS [E], the share with Sharp < 0.

    Neighbours are rows of the pool. Isolated anchors have no sharpness, divergence or ADS: null, never zero.
    """
    found = []
    for anchors in _blocks(graph, spec.memory_mib * 2**20 // 2 // _edge_bytes(anchor_alpha_AC.shape[1])):
        block = rows_of(graph, torch.arange(anchors.start, anchors.stop))
        rows, neighbours = torch.unique(block.neighbours, return_inverse=True)
        # The formulas want a base even where there is no edge to one.
        alpha_NC = _evidence(pool, head, rows.numpy()) if len(rows) else anchor_alpha_AC[:1]
        found.append(
            discrepancy(
                alpha_NC,
                Neighbourhoods(block.offsets, neighbours, block.cosine),
                sharpness=spec.sharpness,
                anchor_alpha=anchor_alpha_AC[anchors],
                factors=spec.factors,
                budget_bytes=spec.memory_mib * 2**20 // 2,
            )
        )
    signals = {"u": opinion(anchor_alpha_AC).uncertainty, "iec": iec(anchor_alpha_AC)}
    signals |= {name: torch.cat([getattr(each, name) for each in found]) for name in SIGNALS}
    columns = {name: pa.array(values.numpy(), pa.float32(), from_pandas=True) for name, values in signals.items()}
    columns["degree"] = pa.array(graph.degree.numpy(), pa.int64())
    ads_E = torch.cat([each.ads for each in found]).float()
    return columns, ads_E, negative_sharpness_share(signals["sharpness"])


def _evidence(pool: Pool, head: EvidentialHead, rows: np.ndarray) -> Tensor:
    """alpha [N, C] of these rows of the pool, where reading rows in no order is cheapest."""
    alpha_NC = empty((len(rows), len(head.weight)), head.weight.dtype)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        alpha_NC[some] = head(pool.features_at(rows[some]))
    return alpha_NC


def _edge_bytes(n_classes: int) -> int:
    """An edge's far end in memory, were each edge to another row: its logits, and the evidence made of them."""
    return 3 * 4 * n_classes


def _blocks(graph: Neighbourhoods, edges: int) -> Iterator[slice]:
    """Runs of anchors with at most so many edges; an anchor that has more is a run of its own."""
    start = 0
    while start < graph.n_anchors:
        room = int(graph.offsets[start]) + max(edges, 1)
        stop = int(torch.searchsorted(graph.offsets, room, right=True)) - 1
        yield slice(start, max(stop, start + 1))
        start = max(stop, start + 1)
