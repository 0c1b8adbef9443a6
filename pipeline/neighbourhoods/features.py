"""The feature vectors of embed units: looked at by their headers, read when they are needed, never used unchecked.

Shape letters: N rows, D width, R rows asked for.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd_core.checks import check_features
from pipeline.errors import DataError
from pipeline.formats.vectors import read_vectors
from pipeline.store import Artefact

FEATURES = "features.npy"


def mapped(unit: Artefact) -> NDArray[Any]:
    """The unit's features [N, D], mapped; `DataError` when the file has not the rows that the unit reports."""
    array = read_vectors(unit.file(FEATURES), ndim=2)
    if len(array) != unit.report["rows_out"]:
        raise DataError(
            f"{unit.file(FEATURES)} has {len(array)} rows, its unit reports {unit.report['rows_out']}; remove the unit "
            "and run again"
        )
    return array


def feature_width(units: Sequence[Artefact]) -> int:
    """D, the one width of all units; only headers are read. `DataError` names two units that differ."""
    widths = {unit.unit: mapped(unit).shape[1] for unit in units}
    width: int
    (first, width), *others = widths.items()
    for other, found in others:
        if found != width:
            raise DataError(
                f"features of {first} are {width} wide, those of {other} {found}; embed both with one backbone: remove "
                f"the embed unit {other} and run again"
            )
    return width


def read_features(units: Sequence[Artefact]) -> Tensor:
    """float32 [N, D] of these units in order, every row finite and of length 1, or `DataError` naming unit and row."""
    feature_width(units)
    parts = []
    for unit in units:
        part = torch.from_numpy(np.array(mapped(unit), dtype=np.float32))
        if len(part):
            try:
                check_features(part, f"features of embed unit {unit.unit}")
            except ValueError as error:
                raise DataError(f"{error}; the file is {unit.file(FEATURES)}") from None
        parts.append(part)
    return torch.cat(parts)


def features_at(units: Sequence[Artefact], rows_R: NDArray[np.int64]) -> Tensor:
    """float32 [R, D]: these rows, ascending, of the units put one after the other; nothing else is read."""
    ends = np.cumsum([unit.report["rows_out"] for unit in units])
    cuts = [0, *np.searchsorted(rows_R, ends)]
    gathered = [
        np.asarray(mapped(unit)[rows_R[low:high] - (end - unit.report["rows_out"])], dtype=np.float32)
        for unit, end, low, high in zip(units, ends, cuts, cuts[1:], strict=False)
        if low < high
    ]
    return torch.from_numpy(np.concatenate(gathered) if gathered else np.zeros((0, feature_width(units)), np.float32))
