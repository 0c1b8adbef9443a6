"""detect: do u, IEC and ADS tell corrupted images from clean ones? Test images against the pool's neighbourhoods.

Shape letters: A test images, N rows of the pool, C classes, D width.
"""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from bd_core.metrics import auroc
from bd_core.neighbourhood import Neighbourhoods, radius_graph
from pipeline.config import Spec
from pipeline.formats.schemas import DETECTION, TEST_IMAGES
from pipeline.formats.tables import read_table, write_table
from pipeline.formats.vectors import read_vectors
from pipeline.neighbourhoods.csr import side_by_side, within_adaptive_radius
from pipeline.neighbourhoods.features import read_features
from pipeline.neighbourhoods.joins import least_cosines
from pipeline.neighbourhoods.partitions import partitions
from pipeline.neighbourhoods.radius import Radius
from pipeline.neighbourhoods.spec import IndexSpec
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.corrupt import CLEAN
from pipeline.stages.fit_head import load_head
from pipeline.stages.models import open_backbone
from pipeline.stages.pool import Pool
from pipeline.stages.predictors import Static, features_of
from pipeline.stages.score import ScoreSpec, scored

SIGNALS = ("u", "iec", "mean_ads")


class DetectSpec(Spec):
    """Nothing to choose: radius, head and form of the ADS are those of the run."""


class Detect(Stage):
    """Scores every test image, clean and corrupted, by the three signals of the method."""

    name: ClassVar[str] = "detect"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("base", "embed", "radius", "fit_head", "score", "corrupt")
    what: ClassVar[str] = "measure how uncertainty and discrepancy detect corruption"
    spec: DetectSpec

    def __init__(self, spec: DetectSpec, score: ScoreSpec, index: IndexSpec, resources: Any = None) -> None:
        super().__init__(spec, resources)
        self._score, self._rows_at_a_time = score, index.rows_per_partition

    def hashed_spec(self) -> dict[str, Any]:
        """The form of the ADS."""
        return self._score.model_dump(mode="json")

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit: all levels, so that they can be compared."""
        given = [artefact for name in ("base", "embed", "radius", "fit_head", "corrupt") for artefact in inputs[name]]
        return [Unit("detect", inputs=tuple(given))]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write `scores.parquet` and `metrics.json` (AUROC against clean, isolated share by level)."""
        pool = Pool.of(unit.inputs)
        backbone = open_backbone(unit.one("base"))
        backbone.model.to(self.device)
        head, _ = load_head(unit.one("fit_head"))
        report = StageReport(rows_in=0, rows_out=0)
        tables = []
        for part in unit.of("corrupt"):
            pixels = torch.from_numpy(read_vectors(part.file("images.npy")).copy())
            if not len(pixels):
                continue
            with report.span("forward_backward"):
                features_AD, _ = features_of(
                    Static(backbone, backbone.visual), pixels, "", self.resources.batch_size, self.device
                )
            with torch.no_grad():
                graph = self._graph(unit, features_AD)
                columns, _ = scored(pool, head, head(features_AD), graph, self._score)
            samples = read_table(part.file("samples.parquet"), TEST_IMAGES, ["sample_id", "task"])
            level = pa.array([part.report["notes"]["level"]] * len(pixels), pa.string())
            named = {"sample_id": samples["sample_id"], "task": samples["task"], "level": level}
            tables.append(pa.table(named | {name: columns[name] for name in (*SIGNALS, "degree")}))
            report.rows_in += len(pixels)
        report.rows_out = report.rows_in
        scores = pa.concat_tables(tables)
        write_table(out_dir / "scores.parquet", DETECTION, scores.to_pydict())
        metrics = detection_metrics(scores)
        (out_dir / "metrics.json").write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        report.metrics = {
            f"auroc_{signal}/{level}": value
            for signal, levels in metrics["auroc"].items()
            for level, value in levels.items()
            if value is not None
        }
        return report

    def _graph(self, unit: Unit, features_AD: Tensor) -> Neighbourhoods:
        """Neighbours in the pool, exact whatever the back end, a partition at a time; no test image is in it."""
        radius, found = Radius.read(unit.one("radius").path), []
        queries_AD = features_AD.to(self.device)
        for part in partitions(unit.of("embed"), self._rows_at_a_time):
            base_ND = read_features(part.units).to(self.device)
            near = radius_graph(queries_AD, least_cosines(queries_AD, base_ND, radius), base_MD=base_ND)
            found.append((Neighbourhoods(near.offsets.cpu(), near.neighbours.cpu(), near.cosine.cpu()), part.first_row))
        graph = side_by_side(found)
        return within_adaptive_radius(graph, radius.target_degree) if radius.mode == "adaptive" else graph


def detection_metrics(scores: pa.Table) -> dict[str, Any]:
    """AUROC of every signal for clean against each level (isolated images left out), and the isolated share."""
    frame = scores.to_pandas()
    clean, levels = frame[frame["level"] == CLEAN], [v for v in frame["level"].unique() if v != CLEAN]
    found: dict[str, Any] = {"auroc": {}, "isolated": {}}
    for signal in SIGNALS:
        found["auroc"][signal] = {}
        for level in levels:
            shifted = frame[frame["level"] == level]
            values = np.concatenate([clean[signal].to_numpy(), shifted[signal].to_numpy()]).astype(np.float64)
            corrupted = np.concatenate([np.zeros(len(clean), bool), np.ones(len(shifted), bool)])
            there = np.isfinite(values)
            both = len(set(corrupted[there])) == 2
            found["auroc"][signal][level] = (
                auroc(torch.from_numpy(values[there]), torch.from_numpy(corrupted[there])) if both else None
            )
    for level in (CLEAN, *levels):
        own = frame[frame["level"] == level]
        found["isolated"][level] = float((own["degree"] == 0).mean())
    return found
