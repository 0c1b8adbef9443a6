"""index: a FAISS index over the pool for later queries, and the radius, calibrated once for all shards."""

import json
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from bd_core.neighbourhood import Neighbourhoods, adaptive_min_cosine, calibrate_min_cosine, radius_graph
from pipeline.config import Spec
from pipeline.errors import ConfigError
from pipeline.formats.faiss_index import build_flat, range_search, write_index
from pipeline.formats.vectors import write_vectors
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.pool import Pool


class IndexSpec(Spec):
    """The radius. The paper publishes none; both ways of setting it are ours."""

    radius: Literal["global", "adaptive"] = "global"
    min_cosine: float | None = Field(default=None, ge=-1, le=1, description="overrides the calibration")
    max_isolated: float = Field(default=0.02, ge=0, lt=1, description="global: share of samples left alone")
    target_degree: int = Field(default=32, ge=1, description="adaptive: neighbours a sample should have")
    sample: int = Field(default=4096, ge=2, description="rows the calibration looks at")
    recall_sample: int = Field(default=256, ge=1, description="queries on which edge recall is measured")


class Index(Stage):
    """Builds the index and fixes the radius."""

    name: ClassVar[str] = "index"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("embed",)
    what: ClassVar[str] = "index the pool and calibrate the radius"
    spec: IndexSpec

    def units(self, inputs: Inputs) -> list[Unit]:
        """One partition; larger pools get more of them with the approximate back ends."""
        return [Unit("part-00", inputs=tuple(inputs["embed"]))]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write `index.faiss`, `rows.npy` and `radius.json`; edge recall against the exact graph in the report."""
        spec, pool = self.spec, Pool.of(unit.inputs)
        report = StageReport(rows_in=pool.n_rows, rows_out=pool.n_rows)
        features_ND = pool.features()
        generator = torch.Generator().manual_seed(self.seed or 0)
        with report.span("calibrate"):
            if spec.radius == "adaptive":
                chosen = adaptive_min_cosine(features_ND, spec.target_degree)
                min_cosine = float(chosen.median())
            elif spec.min_cosine is not None:
                min_cosine = spec.min_cosine
            else:
                min_cosine = calibrate_min_cosine(
                    features_ND, max_isolated=spec.max_isolated, sample=spec.sample, generator=generator
                )
        rows_Q = torch.randperm(len(features_ND), generator=generator)[: spec.recall_sample]
        exact = radius_graph(features_ND[rows_Q], min_cosine, base_MD=features_ND, self_rows=rows_Q)
        if spec.radius == "global" and exact.isolated_share == 1.0:
            raise ConfigError(
                f"index.min_cosine {min_cosine:g}: none of {len(rows_Q)} sampled images has a neighbour within this "
                "radius; lower it, or leave it out and let index.max_isolated calibrate it"
            )
        with report.span("build"):
            index = build_flat(features_ND.numpy())
            write_index(out_dir / "index.faiss", index)
        found = range_search(index, features_ND[rows_Q].numpy(), min_cosine, self_rows=rows_Q.numpy())
        report.metrics = {
            "min_cosine": min_cosine,
            "isolated_share_sample": exact.isolated_share,
            "edge_recall": edge_recall(exact, found, pool.n_rows),
        }
        write_vectors(out_dir / "rows.npy", torch.arange(len(features_ND)).numpy())
        radius = {
            "mode": spec.radius,
            "min_cosine": min_cosine,
            "target_degree": spec.target_degree,
            "isolated_share_sample": exact.isolated_share,
        }
        (out_dir / "radius.json").write_text(json.dumps(radius, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return report


def edge_recall(exact: Neighbourhoods, found: Neighbourhoods, n_rows: int) -> float:
    """The share of the exact graph's edges that `found` has too; 1.0 when there is none to find."""
    if not len(exact.neighbours):
        return 1.0
    wanted, present = (graph.anchors() * n_rows + graph.neighbours for graph in (exact, found))
    return torch.isin(wanted, present).double().mean().item()
