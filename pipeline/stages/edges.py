"""edges: the join of every two partitions of the pool, so that a new one costs its own joins and no others."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from bd_core.neighbourhood import radius_graph
from pipeline import logs
from pipeline.errors import DataError
from pipeline.formats.faiss_index import read_index, read_probes
from pipeline.formats.faiss_ivf import check_holds, nearest_lists
from pipeline.neighbourhoods.csr import edges_shared, rows_of
from pipeline.neighbourhoods.features import mapped, read_features
from pipeline.neighbourhoods.joins import Joined, Side, join, least_cosines
from pipeline.neighbourhoods.partitions import Partition, pair_id, pairs, partitions
from pipeline.neighbourhoods.planner import Choice, check_fits, duration, expect
from pipeline.neighbourhoods.probes import measured_flops
from pipeline.neighbourhoods.radius import QUANTIZER, Radius
from pipeline.neighbourhoods.spec import IndexSpec
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.index import INDEX, PROBES
from pipeline.stages.neighbour_files import write_neighbourhoods
from pipeline.store import Artefact

FORWARD, BACKWARD = "forward", "backward"
WORTH_MEASURING = 1e12  # operations; less is done before anybody would read an estimate


class Edges(Stage):
    """Joins two partitions: the edges of the first's rows into the second, and back."""

    name: ClassVar[str] = "edges"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("embed", "radius", "index")
    what: ClassVar[str] = "join the partitions of the pool within the radius"
    spec: IndexSpec

    def hashed_spec(self) -> dict[str, Any]:
        """What the measured recall must reach; radius and lists are inputs, partitions are named by theirs."""
        return self.spec.of("recall_sample", "min_edge_recall")

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit for every two partitions, and one for each with itself."""
        (radius,) = inputs["radius"]
        indexes = {artefact.unit: artefact for artefact in inputs["index"]}
        parts = partitions(inputs["embed"], self.spec.rows_per_partition)
        if indexes and (missing := [part.id for part in parts if part.id not in indexes]):
            raise DataError(f"the index of partition {', '.join(missing)} is missing; run again to build it")
        return [self._unit(radius, first, second, indexes) for first, second in pairs(parts)]

    def _unit(self, radius: Artefact, first: Partition, second: Partition, indexes: dict[str, Artefact]) -> Unit:
        both = [first] if first.id == second.id else [first, second]
        given = [unit for part in both for unit in part.units]
        built = [indexes[part.id] for part in both] if indexes else []
        settings = {"units_of_first": len(first.units)}
        return Unit(pair_id(first, second), inputs=(radius, *given, *built), settings=settings)

    def expect(self, units: Sequence[Unit]) -> dict[str, Any]:
        """What these joins will take; `ConfigError` when one does not fit the budget, or their edges the disk."""
        radius = units[0].one("radius")
        decided, seen = Radius.read(radius.path), radius.report
        whole = {unit.unit: int(unit.report["rows_out"]) for each in units for unit in each.of("embed")}
        n_rows = sum(whole.values())
        sides = [self._sides(each) for each in units]
        rows = [[sum(int(unit.report["rows_out"]) for unit in side) for side in both] for both in sides]
        products = sum(counts[0] * counts[-1] * len(counts) for counts in rows)
        width = mapped(sides[0][0][0]).shape[1]
        degree = seen["metrics"]["degree_sample"]
        if decided.mode == "global":
            degree *= n_rows / seen["rows_in"]  # within a fixed radius there are as many more as the pool is larger
        choice = Choice(decided.backend, decided.n_lists, "")
        large = products * width > WORTH_MEASURING
        rate = measured_flops(width, self.resources.threads, self.device) if large else 1e9 * self.spec.gflops
        share = min(1.0, products / n_rows**2)
        expected = expect(
            choice,
            n_rows=n_rows,
            width=width,
            degree=degree,
            n_probes=decided.n_probes,
            largest_part=max(max(counts) for counts in rows),
            flops_per_s=rate,
            share=share,
        )
        check_fits(
            expected,
            choice,
            n_rows=n_rows,
            rows=max(max(counts) for counts in rows),
            width=width,
            degree=degree,
            memory_gib=self.spec.memory_gib,
            free_bytes=shutil.disk_usage(radius.path).free,
        )
        facts = {
            "backend": decided.backend,
            "rows": n_rows,
            "joins": len(units),
            "edges": f"{expected.edges:,.0f}",
            "worker_time": duration(expected.seconds),
            "GFLOP/s": f"{rate / 1e9:.0f}",
            "memory_MiB": f"{expected.memory_bytes / 2**20:.0f}",
            "disk_MiB": f"{expected.disk_bytes / 2**20:.0f}",
        }
        return facts | ({"lists": decided.n_lists, "probes": decided.n_probes} if decided.n_lists else {})

    @staticmethod
    def _sides(unit: Unit) -> list[list[Artefact]]:
        """The embed units of the first partition, and those of the second unless they are the same."""
        embedded, count = unit.of("embed"), unit.settings["units_of_first"]
        return [embedded[:count], embedded[count:]] if embedded[count:] else [embedded]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write `forward/` and, where the partitions differ, `backward/`: CSR, neighbours are rows of the other one."""
        radius = Radius.read(unit.one("radius").path)
        report = StageReport(rows_in=0, rows_out=0)
        with report.span("read"):
            sides = [self._side(unit, place, units) for place, units in enumerate(self._sides(unit))]
        first, second = sides[0], (sides[1] if len(sides) > 1 else None)
        report.rows_in = report.rows_out = sum(len(side.features) for side in sides)
        joined = self._joined(unit, first, second, radius, report)
        found = {FORWARD: joined.forward} | ({} if joined.backward is None else {BACKWARD: joined.backward})
        for name, graph in found.items():
            (out_dir / name).mkdir()
            write_neighbourhoods(out_dir / name, graph, local=True)
        report.metrics["edges"] = float(sum(len(graph.neighbours) for graph in found.values()))
        return report

    def _side(self, unit: Unit, place: int, units: list[Artefact]) -> Side:
        features = read_features(units)
        if not (built := unit.of("index")):
            return Side(features)
        path = built[place].file(INDEX)
        index = read_index(path, rows=len(features), width=features.shape[1])
        probes = read_probes(built[place].file(PROBES))
        if len(probes) != len(features):
            raise DataError(f"{built[place].file(PROBES)} has {len(probes)} of {len(features)} rows; remove its unit")
        check_holds(index, features.numpy(), probes, path)
        return Side(features, index, probes)

    def _joined(self, unit: Unit, first: Side, second: Side | None, radius: Radius, report: StageReport) -> Joined:
        """The join, its recall measured unless it is exact by itself; of IVF more lists are searched until it holds."""
        while True:
            with report.span("join"):
                joined = join(first, second, radius, self.device)
            if radius.backend == "exact":
                return joined
            with report.span("recall"):
                wanted, shared = self._recall(first, second, radius, joined)
            recall = shared / wanted if wanted else 1.0
            bearable = (1 - self.spec.min_edge_recall) * self._usual(first, second, radius, wanted)
            report.metrics |= {"recall_edges": float(wanted), "recall_found": float(shared), "edge_recall": recall}
            report.metrics["n_probes"] = float(radius.n_probes)
            if wanted - shared <= bearable:
                return joined
            if radius.backend != "ivf" or radius.n_probes >= radius.n_lists:
                raise DataError(
                    f"{self.name} {unit.id}: edge recall {recall:.4f} of {wanted} edges is below index.min_edge_recall "
                    f"{self.spec.min_edge_recall:g} with every list searched; set index.backend=exact"
                )
            report.notes["probes_raised"] = [*report.notes.get("probes_raised", [radius.n_probes]), 2 * radius.n_probes]
            radius = replace(radius, n_probes=min(radius.n_lists, 2 * radius.n_probes))
            logs.fact("more lists are searched", unit=unit.id, edge_recall=recall, n_probes=radius.n_probes)
            first = self._probing(unit, first, radius)
            second = second and self._probing(unit, second, radius)

    def _usual(self, first: Side, second: Side | None, radius: Radius, wanted: int) -> float:
        """The mean of the edges of the sample here and in a join with as many edges as any.

        Where partitions have little to do with each other a few lost edges are a large share of none that matters: what
        all joins together may lose is shared out half by their edges and half evenly, which comes to the same sum.
        """
        sampled = min(self.spec.recall_sample // 4, len(first.features))
        return (wanted + radius.edge_share * sampled * len((second or first).features)) / 2

    @staticmethod
    def _probing(unit: Unit, side: Side, radius: Radius) -> Side:
        """The side with enough lists of each row at hand."""
        if side.probes is None or side.probes.shape[1] >= radius.n_probes:
            return side
        empty = read_index(unit.one("radius").file(QUANTIZER))
        return replace(side, probes=nearest_lists(empty, side.features.numpy(), radius.n_lists))

    def _recall(self, first: Side, second: Side | None, radius: Radius, joined: Joined) -> tuple[int, int]:
        """Edges of a fixed sample of the first partition's rows in the exact graph, and how many of them were found."""
        n_rows = len(first.features)
        rows = torch.linspace(0, n_rows - 1, min(self.spec.recall_sample // 4, n_rows)).round().long()
        base, own = (first.features, rows) if second is None else (second.features, None)
        queries = first.features[rows]
        least = least_cosines(queries, base, radius, own)
        if isinstance(least, torch.Tensor) and second is not None:
            # What is further than the nearest in their own partition is a candidate here and an edge nowhere.
            least = least.maximum(torch.as_tensor(least_cosines(queries, first.features, radius, rows)))
        exact = radius_graph(queries, least, base_MD=base, self_rows=own)
        return len(exact.neighbours), edges_shared(exact, rows_of(joined.forward, rows))
