"""FAISS, behind one door: flat indexes, written and read whole, with the project's own radius convention.

Ours is inclusive cosine (an edge when cos >= min_cosine); FAISS's `range_search` is strict, so the radius handed over
is the float just below.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bd_core.neighbourhood import Neighbourhoods
from pipeline.errors import DataError

FloatRows = NDArray[np.float32]


def build_flat(features: FloatRows) -> Any:
    """An exact inner-product index over L2-normalised rows [N, D]."""
    import faiss

    index = faiss.IndexFlatIP(features.shape[1])
    index.add(np.ascontiguousarray(features))
    return index


def write_index(path: Path, index: Any) -> None:
    """Write `index` to `path`."""
    import faiss

    faiss.write_index(index, str(path))


def read_index(path: Path) -> Any:
    """The index at `path`, in memory; `DataError` when it is not one."""
    import faiss

    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise DataError(f"{path} is not a readable FAISS index ({reason}); remove its unit and run again") from error


def range_search(
    index: Any, queries: FloatRows, min_cosine: float, self_rows: NDArray[np.int64] | None = None
) -> Neighbourhoods:
    """The radius graph of `queries` [Q, D] on the index: inclusive, neighbours ascending, own rows left out."""
    strict = float(np.nextafter(np.float32(min_cosine), np.float32(-np.inf)))
    limits, cosine, neighbours = index.range_search(np.ascontiguousarray(queries), strict)
    anchors = np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64)))
    keep = np.ones(len(anchors), dtype=bool) if self_rows is None else neighbours != self_rows[anchors]
    anchors, neighbours, cosine = anchors[keep], neighbours[keep], cosine[keep]
    order = np.lexsort((neighbours, anchors))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(anchors, minlength=len(queries)))])
    return Neighbourhoods(
        torch.from_numpy(offsets.astype(np.int64)),
        torch.from_numpy(neighbours[order].astype(np.int64)),
        torch.from_numpy(cosine[order].astype(np.float32)),
    )
