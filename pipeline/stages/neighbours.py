"""neighbours: the radius graph, one CSR part for each shard of the pool."""

import json
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from bd_core.neighbourhood import adaptive_min_cosine, radius_graph
from pipeline.config import Spec
from pipeline.formats.faiss_index import range_search, read_index
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.neighbour_files import write_neighbourhoods
from pipeline.stages.pool import Pool


class NeighboursSpec(Spec):
    """Which back end finds the edges; both are exact."""

    backend: Literal["exact", "faiss"] = Field(
        default="exact", description="blockwise matmul and threshold, or FAISS Flat (global radius only)"
    )
    block_rows: int = Field(default=1024, ge=1)


class Neighbours(Stage):
    """Finds A_r(x) of every image of one shard among all images of the pool."""

    name: ClassVar[str] = "neighbours"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("embed", "index")
    what: ClassVar[str] = "find the neighbours within the radius"
    spec: NeighboursSpec

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit for each embed unit that has rows: a shard may hold nothing but images that others hold too."""
        return [
            Unit(shard.unit, inputs=(*inputs["embed"], *inputs["index"]), settings={"shard": shard.unit})
            for shard in sorted(inputs["embed"], key=lambda artefact: artefact.unit)
            if shard.report["rows_out"]
        ]

    def setup(self, unit: Unit) -> None:
        """Load the pool's features and the radius once."""
        self._pool = Pool.of(unit.inputs)
        self._features_ND = self._pool.features()
        self._radius = json.loads(unit.one("index").file("radius.json").read_text(encoding="utf-8"))

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write the shard's CSR part: sorted, self excluded, radius inclusive."""
        rows = self._pool.rows_of(unit.settings["shard"])
        rows_Q = torch.arange(rows.start, rows.stop)
        queries_QD = self._features_ND[rows_Q]
        report = StageReport(rows_in=len(rows), rows_out=len(rows))
        with report.span("neighbours"):
            if self._radius["mode"] == "adaptive":
                radius_Q = adaptive_min_cosine(
                    queries_QD, self._radius["target_degree"], base_MD=self._features_ND, self_rows=rows_Q
                )
                graph = radius_graph(queries_QD, radius_Q, base_MD=self._features_ND, self_rows=rows_Q)
            elif self.spec.backend == "faiss":
                index = read_index(unit.one("index").file("index.faiss"))
                graph = range_search(index, queries_QD.numpy(), self._radius["min_cosine"], rows_Q.numpy())
            else:
                graph = radius_graph(
                    queries_QD,
                    self._radius["min_cosine"],
                    base_MD=self._features_ND,
                    self_rows=rows_Q,
                    block_rows=self.spec.block_rows,
                )
        report.metrics = {
            "edges": float(len(graph.neighbours)),
            "isolated": float(graph.n_isolated),
            "max_degree": float(graph.degree.max()),
            "truncated": 0.0,
        }
        write_neighbourhoods(out_dir, graph)
        return report
