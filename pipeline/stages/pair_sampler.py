"""Draws anchors with some of their positives and negatives from the pairs that were fixed before.

Shape letters: A anchors, M positives and negatives drawn for an anchor (padded), P anchors that have both kinds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.formats.schemas import PAIRS
from pipeline.formats.tables import read_table
from pipeline.store import Artefact


@dataclass(frozen=True)
class DrawnPairs:
    """Rows of anchors [A] and of others [A, M]; which others are positives, and which are padding."""

    anchor_A: Tensor
    others_AM: Tensor
    positive_AM: Tensor
    valid_AM: Tensor


def _columns(part: Artefact) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Anchors, others, and which pairs are negatives, of one part."""
    table = read_table(part.file("pairs.parquet"), PAIRS, ["anchor", "other", "kind"])
    # Compared as Arrow's strings: as Python's they would take more room than all the rest.
    negative = pc.equal(table["kind"], "negative").to_numpy()
    return table["anchor"].to_numpy(), table["other"].to_numpy(), negative


@dataclass(frozen=True)
class PairSampler:
    """Anchors that have positives and negatives, and where in `other` each one's lie (positives first)."""

    anchor_P: NDArray[np.int64]
    begin_P: NDArray[np.int64]
    negatives_P: NDArray[np.int64]
    end_P: NDArray[np.int64]
    other_E: NDArray[np.int64]

    @classmethod
    def read(cls, parts: Sequence[Artefact]) -> Self:
        """The sampler over the pairs of all `parts`; anchors without both kinds are left out."""
        columns = [_columns(part) for part in parts]
        anchor, other, negative = (np.concatenate(each) for each in zip(*columns, strict=True))
        del columns
        pa.default_memory_pool().release_unused()
        order = np.lexsort((other, negative, anchor))
        anchor, other, negative = anchor[order], other[order], negative[order]
        anchors, begin, counts = np.unique(anchor, return_index=True, return_counts=True)
        n_negative = np.add.reduceat(negative.astype(np.int64), begin) if len(anchors) else counts
        both = (n_negative > 0) & (n_negative < counts)
        end = begin + counts
        return cls(anchors[both], begin[both], (end - n_negative)[both], end[both], other)

    @property
    def n_anchors(self) -> int:
        """How many anchors can be drawn."""
        return len(self.anchor_P)

    def draw(self, n_anchors: int, positives: int, negatives: int, generator: torch.Generator) -> DrawnPairs:
        """`n_anchors` anchors, each with up to so many of its positives and negatives, drawn without replacement."""
        rows_A = torch.randint(self.n_anchors, (n_anchors,), generator=generator).numpy()
        others = np.zeros((n_anchors, positives + negatives), dtype=np.int64)
        valid = np.zeros(others.shape, dtype=bool)
        for place, row in enumerate(rows_A):
            spans = (
                (0, positives, self.begin_P[row], self.negatives_P[row]),
                (positives, negatives, self.negatives_P[row], self.end_P[row]),
            )
            for column, wanted, begin, end in spans:
                chosen = torch.randperm(int(end - begin), generator=generator)[:wanted].numpy()
                others[place, column : column + len(chosen)] = self.other_E[begin + chosen]
                valid[place, column : column + len(chosen)] = True
        positive = valid & (np.arange(others.shape[1]) < positives)
        # Padding points at the anchor's own row: an image that is in the batch anyway.
        others = np.where(valid, others, self.anchor_P[rows_A][:, None])
        return DrawnPairs(*(torch.from_numpy(part) for part in (self.anchor_P[rows_A], others, positive, valid)))
