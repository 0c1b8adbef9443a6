"""The auxiliary pool: what `embed` made of the unlabelled images, as one set of rows.

Global row = position over the embed units in order of their ids. Shape letters: N rows, D feature width, W token width,
R rows asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import DataError
from pipeline.formats.schemas import EMBEDDED
from pipeline.formats.tables import read_table
from pipeline.formats.vectors import read_vectors
from pipeline.neighbourhoods.features import features_at, read_features
from pipeline.store import Artefact


@dataclass(frozen=True)
class Pool:
    """The embed units and where each one's rows begin."""

    units: tuple[Artefact, ...]
    first_row: tuple[int, ...]
    n_rows: int

    @classmethod
    def of(cls, artefacts: Sequence[Artefact]) -> "Pool":
        """The pool of `artefacts` (embed units); no vector is read."""
        units = tuple(sorted((a for a in artefacts if a.stage == "embed"), key=lambda artefact: artefact.unit))
        counts = [int(artefact.report["rows_out"]) for artefact in units]
        if not sum(counts):
            raise DataError("no image of the auxiliary data could be embedded; see the rejects of the shard stage")
        starts = np.concatenate([[0], np.cumsum(counts)])
        return cls(units, tuple(int(start) for start in starts[:-1]), int(starts[-1]))

    def rows_of(self, unit: str) -> range:
        """The global rows of the embed unit with this id."""
        place = [artefact.unit for artefact in self.units].index(unit)
        return range(self.first_row[place], (*self.first_row, self.n_rows)[place + 1])

    def features(self) -> Tensor:
        """float32 [N, D], L2-normalised; `DataError` where they are not."""
        return read_features(self.units)

    def features_at(self, rows_R: NDArray[np.int64]) -> Tensor:
        """float32 [R, D]: these rows, ascending; nothing else is read."""
        return features_at(self.units, rows_R)

    def tokens(self) -> Tensor:
        """float32 [N, W]: the pooled token embeddings."""
        parts = [read_vectors(unit.file("tokens.npy")) for unit in self.units]
        return torch.from_numpy(np.concatenate(parts).astype(np.float32, copy=False))

    def tasks(self) -> list[str]:
        """The task of every row."""
        return [
            task
            for unit in self.units
            for task in read_table(unit.file("samples.parquet"), EMBEDDED, ["task"])["task"].to_pylist()
        ]
