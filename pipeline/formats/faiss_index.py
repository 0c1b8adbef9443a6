"""FAISS, behind one door: which indexes are used, how they are read, and range search in the project's convention.

Ours is inclusive cosine (an edge when cos >= min_cosine); FAISS's `range_search` is strict, so the radius handed over
is the float just below. What FAISS would crash on or quietly get wrong is refused here:
`IndexHNSW.range_search` ends the process after some 10^8 / (levels x D x ef) queries of one call, so it is given few;
product and scalar quantisers and PCA change the cosines, so a radius means nothing to them; `IndexShards` has no range
search; an on-disk index read with IO_FLAG_MMAP crashes when it is searched, so no flag is ever passed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bd_core.neighbourhood import Neighbourhoods
from pipeline.errors import DataError
from pipeline.formats.vectors import read_vectors

FloatRows = NDArray[np.float32]
USABLE = ("IndexFlatIP", "IndexFlat", "IndexIVFFlat", "IndexHNSWFlat")
HNSW_QUERIES = 100  # of one call
SIMILAR_RADII = 256  # queries of one call where each has its own radius


def use_threads() -> None:
    """Give FAISS as many threads as torch was given for this unit: Ray would leave it one, or a library all."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())


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


def read_index(path: Path, *, rows: int | None = None, width: int | None = None) -> Any:
    """The index at `path`, in memory or, where its lists lie on disk, beside them.

    `DataError` when it is no index, of a kind that cannot be searched by radius, or not over `rows` rows of `width`.
    """
    import faiss

    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise DataError(f"{path} is not a readable FAISS index ({reason}); remove its unit and run again") from error
    check_usable(index, str(path))
    if (rows is not None and index.ntotal != rows) or (width is not None and index.d != width):
        raise DataError(
            f"{path} is an index over {index.ntotal} rows of width {index.d}, the features are {rows} rows of width "
            f"{width}: it was built from others, or with another backbone; remove its unit and run again"
        )
    return index


def check_usable(index: Any, place: str) -> None:
    """Nothing; `DataError` unless a range search on this kind of index is exact, or misses edges and nothing worse."""
    import faiss

    kind = type(index).__name__
    if kind not in USABLE or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise DataError(
            f"{place}: an index of type {kind} cannot be searched by cosine radius; those that can, over inner "
            f"products: {', '.join(USABLE)}; build it again with index.backend flat or ivf"
        )


def range_search(
    index: Any,
    queries: FloatRows,
    min_cosine: float | NDArray[np.float32],
    self_rows: NDArray[np.int64] | None = None,
    probes: NDArray[np.int64] | None = None,
) -> Neighbourhoods:
    """The radius graph of `queries` [Q, D] on the index: inclusive, neighbours ascending, own rows left out.

    `min_cosine` is one number or one a query. `probes` [Q, P]: the lists of an IVF index to look into for each query.
    """
    check_usable(index, "range_search")
    radius = np.asarray(min_cosine, dtype=np.float32)
    found = [_one_call(index, queries, radius, rows, probes) for rows in _calls(index, radius, len(queries))]
    anchors, neighbours, cosine = (np.concatenate(each) for each in zip(*found, strict=True))
    keep = np.ones(len(anchors), dtype=bool) if self_rows is None else neighbours != self_rows[anchors]
    if radius.ndim:
        keep &= cosine >= radius[anchors]
    return graph_of(anchors[keep], neighbours[keep], cosine[keep], len(queries))


def graph_of(
    anchors: NDArray[np.int64], neighbours: NDArray[np.int64], cosine: NDArray[np.float32], n_queries: int
) -> Neighbourhoods:
    """The graph of these hits, which come in any order, each once."""
    order = np.lexsort((neighbours, anchors))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(anchors, minlength=n_queries))])
    return Neighbourhoods(
        torch.from_numpy(offsets.astype(np.int64)),
        torch.from_numpy(neighbours[order].astype(np.int64)),
        torch.from_numpy(cosine[order].astype(np.float32)),
    )


def _calls(index: Any, radius: NDArray[np.float32], n_queries: int) -> list[NDArray[np.int64] | slice]:
    """The queries of each call. Those with radii of their own go by likeness: a call searches with its widest one."""
    size = SIMILAR_RADII if radius.ndim else n_queries
    if type(index).__name__ == "IndexHNSWFlat":
        size = min(size, HNSW_QUERIES)
    runs = [slice(start, min(start + size, n_queries)) for start in range(0, n_queries, max(size, 1))]
    if not radius.ndim:
        return [*runs]  # runs of rows are not copied
    order = np.argsort(radius, kind="stable")
    return [order[run] for run in runs]


def _one_call(
    index: Any,
    queries: FloatRows,
    radius: NDArray[np.float32],
    rows: NDArray[np.int64] | slice,
    probes: NDArray[np.int64] | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Anchor, neighbour and cosine of every hit of these queries."""
    widest = radius if not radius.ndim else radius[rows].min()
    strict = float(np.nextafter(np.float32(widest), np.float32(-np.inf)))
    given = np.ascontiguousarray(queries[rows])
    if probes is None:
        limits, cosine, neighbours = index.range_search(given, strict)
    else:
        index.nprobe = probes.shape[1]
        limits, cosine, neighbours = index.range_search_preassigned(given, strict, probes[rows], None)
    anchors = np.arange(len(queries))[rows]
    return np.repeat(anchors, np.diff(limits.astype(np.int64))), neighbours, cosine


def kth_cosines(index: Any, queries: FloatRows, k: int, probes: NDArray[np.int64] | None = None) -> FloatRows:
    """The k-th largest cosine [Q] of every query on the index, as far as it finds any; -1 where it finds fewer."""
    check_usable(index, "kth_cosines")
    given = np.ascontiguousarray(queries)
    if probes is None:
        cosine, neighbours = index.search(given, k)
    else:
        index.nprobe = probes.shape[1]
        cosine, neighbours = index.search_preassigned(given, k, probes, np.zeros(probes.shape, np.float32))
    return np.where(neighbours[:, -1] >= 0, cosine[:, -1], np.float32(-1)).clip(-1, 1).astype(np.float32)


def read_probes(path: Path) -> NDArray[np.int64]:
    """The lists of an IVF index nearest to each row, [N, P], nearest first."""
    return np.asarray(read_vectors(path, ndim=2), dtype=np.int64)
