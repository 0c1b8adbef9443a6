"""neighbours: the radius graph, one CSR part for each shard of the pool, gathered from the joins of its partition."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from bd_core.neighbourhood import Neighbourhoods
from pipeline.config import Spec
from pipeline.errors import DataError
from pipeline.neighbourhoods.csr import nearest, side_by_side, within_adaptive_radius
from pipeline.neighbourhoods.partitions import Partition, pair_id, partitions
from pipeline.neighbourhoods.radius import Radius
from pipeline.neighbourhoods.spec import IndexSpec
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.edges import BACKWARD, FORWARD
from pipeline.stages.neighbour_files import read_csr, read_rows, write_neighbourhoods
from pipeline.store import Artefact

RECALL_COUNTS = ("recall_edges", "recall_found")  # of the exact graph on the sample of a join; of them in the join


class NeighboursSpec(Spec):
    """What is done to the graph once it is found."""

    max_degree: int | None = Field(
        default=None, ge=1, description="keep only so many nearest neighbours; what is left out is counted"
    )


class Neighbours(Stage):
    """Puts together A_r(x) of every image of one shard."""

    name: ClassVar[str] = "neighbours"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("embed", "radius", "edges")
    what: ClassVar[str] = "gather the neighbours within the radius"
    spec: NeighboursSpec

    def __init__(self, spec: NeighboursSpec, index: IndexSpec, resources: object = None) -> None:
        super().__init__(spec, resources)  # type: ignore[arg-type]
        self._rows_per_partition, self._min_edge_recall = index.rows_per_partition, index.min_edge_recall

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit for each embed unit that has rows: a shard may hold nothing but images that others hold too."""
        parts = partitions(inputs["embed"], self._rows_per_partition)
        joins = {artefact.unit: artefact for artefact in inputs["edges"]}
        check_recall(inputs["edges"], self._min_edge_recall)
        return [
            self._unit(inputs["radius"][0], shard.unit, part, parts, joins) for part in parts for shard in part.units
        ]

    @staticmethod
    def _unit(
        radius: Artefact, shard: str, part: Partition, parts: list[Partition], joins: dict[str, Artefact]
    ) -> Unit:
        rows, place = part.rows_of(shard), parts.index(part)
        given, sources = [], []
        for number, other in enumerate(parts):
            first, second = (other, part) if number < place else (part, other)
            name = pair_id(first, second)
            if name not in joins:
                raise DataError(f"the join {name} is missing, so {shard} would lack neighbours; run again to make it")
            given.append(joins[name])
            sources.append([name, BACKWARD if number < place else FORWARD, other.first_row])
        settings = {"rows": [rows.start, rows.stop], "joins": sources}
        return Unit(shard, inputs=(radius, *given), settings=settings)

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write the shard's CSR part: neighbours are rows of the pool, sorted; self excluded, radius inclusive."""
        radius = Radius.read(unit.one("radius").path)
        start, stop = unit.settings["rows"]
        report = StageReport(rows_in=stop - start, rows_out=stop - start)
        with report.span("gather"):
            graph = self._gathered(unit, start, stop)
            if radius.mode == "adaptive":
                graph = within_adaptive_radius(graph, radius.target_degree)
            graph, truncated = self._capped(graph)
        report.metrics = {
            "edges": float(len(graph.neighbours)),
            "isolated": float(graph.n_isolated),
            "max_degree": float(graph.degree.max()),
            "truncated": float(truncated),
        }
        write_neighbourhoods(out_dir, graph)
        return report

    @staticmethod
    def _gathered(unit: Unit, start: int, stop: int) -> Neighbourhoods:
        """These rows' edges from all joins; checked once, together, and where that fails join by join for its name."""
        joins = [(unit.one("edges", name).path / way, first_row) for name, way, first_row in unit.settings["joins"]]
        try:
            return side_by_side([(read_csr(path, start, stop), first_row) for path, first_row in joins])
        except (ValueError, RuntimeError) as error:  # torch's own, where offsets fall
            for path, _ in joins:
                read_rows(path, start, stop)
            raise DataError(f"neighbours {unit.id}: its joins do not fit together ({error}); remove them") from error

    def _capped(self, graph: Neighbourhoods) -> tuple[Neighbourhoods, int]:
        """The graph with at most `max_degree` neighbours an anchor, and how many edges that left out."""
        if self.spec.max_degree is None:
            return graph, 0
        capped = nearest(graph, self.spec.max_degree)
        return capped, len(graph.neighbours) - len(capped.neighbours)


def measured_recall(joins: Sequence[Artefact]) -> float | None:
    """Edge recall over the samples of all joins together; None where they are exact by construction."""
    wanted, found = (sum(float(a.report["metrics"].get(name, 0)) for a in joins) for name in RECALL_COUNTS)
    return found / wanted if wanted else None


def check_recall(joins: Sequence[Artefact], least: float) -> None:
    """Nothing; `DataError` when the joins lost more edges than they may: never fewer edges without a word."""
    recall = measured_recall(joins)
    if recall is not None and recall < least:
        raise DataError(
            f"edges: edge recall is {recall:.4f} over all {len(joins)} joins, index.min_edge_recall is {least:g}; set "
            f"it to {(1 + least) / 2:g} for the joins to search further, or set index.backend=exact"
        )
