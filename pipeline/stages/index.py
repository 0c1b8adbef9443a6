"""index: for IVF, each partition's rows in the lists of the one trained quantiser; nothing for the exact back ends."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.formats.faiss_index import read_index, use_threads, write_index
from pipeline.formats.faiss_ivf import add_part, nearest_lists
from pipeline.formats.vectors import write_vectors
from pipeline.neighbourhoods.features import read_features
from pipeline.neighbourhoods.partitions import partitions
from pipeline.neighbourhoods.radius import QUANTIZER, Radius
from pipeline.neighbourhoods.spec import IndexSpec
from pipeline.stage import Inputs, Stage, StageReport, Unit

INDEX, PROBES = "index.faiss", "probes.npy"
PROBES_KEPT = 8  # times those the sample needed: as far as a join can raise them without looking for lists again


class Index(Stage):
    """Builds one index a partition, each on its own."""

    name: ClassVar[str] = "index"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("embed", "radius")
    what: ClassVar[str] = "put the pool's partitions into the lists of the quantiser"
    spec: IndexSpec

    def hashed_spec(self) -> dict[str, Any]:
        """Nothing: the quantiser is an input."""
        return {}

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit a partition where the search is approximate; exact back ends index what they join on the spot."""
        (radius,) = inputs["radius"]
        if Radius.read(radius.path).backend != "ivf":
            return []
        parts = partitions(inputs["embed"], self.spec.rows_per_partition)
        return [Unit(part.id, inputs=(radius, *part.units)) for part in parts]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write `index.faiss` (ids are rows of the partition) and `probes.npy`, each row's lists, nearest first."""
        radius, features = unit.one("radius"), read_features(unit.of("embed")).numpy()
        decided = Radius.read(radius.path)
        use_threads()
        report = StageReport(rows_in=len(features), rows_out=len(features))
        with report.span("assign"):
            empty = read_index(radius.file(QUANTIZER), rows=0, width=features.shape[1])
            probes = nearest_lists(empty, features, min(decided.n_lists, PROBES_KEPT * decided.n_probes))
        with report.span("build"):
            write_index(out_dir / INDEX, add_part(empty, features, probes))
        write_vectors(out_dir / PROBES, probes.astype(np.int32))
        return report
