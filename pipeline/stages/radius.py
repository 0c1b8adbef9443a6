"""radius: how near is near, and how it will be searched; decided once, on a sample that new shards do not change."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bd_core.neighbourhood import Neighbourhoods, adaptive_min_cosine, calibrate_min_cosine, radius_graph
from pipeline.errors import ConfigError
from pipeline.formats.faiss_index import use_threads, write_index
from pipeline.formats.faiss_ivf import train
from pipeline.neighbourhoods.features import feature_width, read_features
from pipeline.neighbourhoods.joins import least_cosines
from pipeline.neighbourhoods.planner import choose
from pipeline.neighbourhoods.probes import probes_needed
from pipeline.neighbourhoods.radius import QUANTIZER, Radius
from pipeline.neighbourhoods.spec import IndexSpec
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.pool import Pool
from pipeline.store import Artefact


class FixRadius(Stage):
    """Calibrates the radius, and trains the quantiser where the search is approximate."""

    name: ClassVar[str] = "radius"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("embed",)
    what: ClassVar[str] = "calibrate the radius and choose how to search"
    spec: IndexSpec

    def hashed_spec(self) -> dict[str, Any]:
        """The radius; what the search is like is a setting of the unit."""
        return self.spec.of("radius", "min_cosine", "max_isolated", "target_degree", "sample", "recall_sample")

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit, over the first shards of each task. The choice of the back end counts, the pool's size does not."""
        spec, pool = self.spec, Pool.of(inputs["embed"])
        width = feature_width(pool.units)
        choice = choose(
            pool.n_rows,
            width,
            wanted=spec.backend,
            expected_rows=spec.expected_rows,
            max_exact_s=spec.max_exact_s,
            gflops=spec.gflops,
        )
        settings: dict[str, Any] = {"backend": choice.backend, "n_lists": choice.n_lists}
        if choice.n_lists:
            settings["min_edge_recall"] = spec.min_edge_recall
        chosen = calibration_units(pool.units, spec.calibration_rows)
        return [Unit("radius", inputs=chosen, settings=settings, payload=choice.reason)]

    def expect(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Which back end was chosen, and why."""
        settings = units[0].settings
        lists = {"lists": settings["n_lists"]} if settings["n_lists"] else {}
        return {"backend": settings["backend"], **lists, "because": units[0].payload}

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write `radius.json`, and `quantizer.faiss` for IVF; what was measured on the sample goes into the report."""
        spec, settings = self.spec, unit.settings
        base_ND = read_features(unit.of("embed"))
        report = StageReport(rows_in=len(base_ND), rows_out=len(base_ND))
        generator = torch.Generator().manual_seed(self.seed or 0)
        with report.span("calibrate"):
            min_cosine = self._min_cosine(base_ND, generator)
        rows_Q = torch.randperm(len(base_ND), generator=generator)[: spec.recall_sample]
        radius = Radius(spec.radius, min_cosine, spec.target_degree, settings["backend"], settings["n_lists"], 0)
        with report.span("sample"):
            queries = base_ND[rows_Q]
            least = least_cosines(queries, base_ND, radius, rows_Q)
            sampled = radius_graph(queries, least, base_MD=base_ND, self_rows=rows_Q)
        if spec.radius == "global" and sampled.isolated_share == 1.0:
            raise ConfigError(
                f"index.min_cosine {min_cosine:g}: none of {len(rows_Q)} sampled images has a neighbour within this "
                "radius; lower it, or leave it out and let index.max_isolated calibrate it"
            )
        if radius.backend == "ivf":
            with report.span("train"):
                radius = self._with_quantizer(radius, base_ND, rows_Q, sampled, out_dir)
        radius.write(out_dir)
        report.metrics = {
            "min_cosine": min_cosine,
            "isolated_share_sample": sampled.isolated_share,
            "degree_sample": len(sampled.neighbours) / len(rows_Q),
            "n_lists": float(radius.n_lists),
            "n_probes": float(radius.n_probes),
        }
        report.notes = {"backend": radius.backend, "pin": f"index.min_cosine={min_cosine!r}"}
        return report

    def _min_cosine(self, base_ND: Tensor, generator: torch.Generator) -> float:
        spec = self.spec
        if len(base_ND) < 2 or (spec.radius == "adaptive" and len(base_ND) <= spec.target_degree):
            wanted = f"index.target_degree {spec.target_degree}" if spec.radius == "adaptive" else "a neighbour"
            raise ConfigError(
                f"{wanted}: the calibration sees {len(base_ND)} images, and an image is not its own neighbour; add "
                "images, or lower it"
            )
        if spec.radius == "adaptive":
            rows = torch.randperm(len(base_ND), generator=generator)[: spec.sample]
            chosen = adaptive_min_cosine(base_ND[rows], spec.target_degree, base_MD=base_ND, self_rows=rows)
            return float(chosen.median())
        if spec.min_cosine is not None:
            return spec.min_cosine
        return calibrate_min_cosine(base_ND, max_isolated=spec.max_isolated, sample=spec.sample, generator=generator)

    def _with_quantizer(
        self, radius: Radius, base_ND: Tensor, rows_Q: Tensor, sampled: Neighbourhoods, out_dir: Path
    ) -> Radius:
        """Train the lists, and find how many of them must be looked into on the sample."""
        if len(base_ND) < radius.n_lists:
            raise ConfigError(
                f"index.calibration_rows {self.spec.calibration_rows}: {len(base_ND)} images to train "
                f"{radius.n_lists} lists on; raise it to {32 * radius.n_lists}, or set index.backend=exact"
            )
        use_threads()
        index = train(base_ND.numpy(), radius.n_lists, self.seed or 0)
        write_index(out_dir / QUANTIZER, index)
        centroids_LD = torch.from_numpy(index.quantizer.reconstruct_n(0, radius.n_lists))
        n_probes = probes_needed(
            sampled,
            base_ND[rows_Q],
            base_ND,
            centroids_LD,
            min_recall=self.spec.min_edge_recall,
            mutual=radius.mode == "global",
        )
        edge_share = len(sampled.neighbours) / (len(rows_Q) * len(base_ND))
        return replace(radius, n_probes=n_probes, edge_share=edge_share)


def calibration_units(embedded: Sequence[Artefact], rows: int) -> tuple[Artefact, ...]:
    """The first units of every task, as many as give it its share of `rows`: those that arrive later change nothing."""
    by_task: dict[str, list[Artefact]] = {}
    for unit in embedded:
        if unit.report["rows_out"]:
            by_task.setdefault(str(unit.report["notes"].get("task")), []).append(unit)
    chosen = []
    for units in by_task.values():
        taken = 0
        for unit in units:
            if taken * len(by_task) >= rows:
                break
            chosen.append(unit)
            taken += unit.report["rows_out"]
    return tuple(sorted(chosen, key=lambda unit: unit.unit))
