"""IVF with FAISS: one quantiser, trained once; parts of the pool added to copies of it, anywhere and in any order.

All parts share the lists, so a row's nearest lists are found once and serve its own part (the first of them holds it)
and every part it is searched in. `IndexIVFFlat` keeps the vectors as they are: within the lists it looks into, its
range search is exact. Shape letters: N rows, D width, P lists looked into.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.formats.faiss_index import FloatRows, read_index

TRAINING_ROUNDS = 10
ROWS_CHECKED = 16


def train(sample: FloatRows, n_lists: int, seed: int) -> Any:
    """An empty index whose `n_lists` centroids were trained on the sample [N, D]; equal input gives equal centroids."""
    import faiss

    quantizer: Any = faiss.IndexFlatIP(sample.shape[1])
    index = faiss.IndexIVFFlat(quantizer, sample.shape[1], n_lists, faiss.METRIC_INNER_PRODUCT)
    index.own_fields = True
    quantizer.this.disown()
    index.cp.seed = 1 + seed
    index.cp.niter = TRAINING_ROUNDS
    index.cp.spherical = True
    index.cp.min_points_per_centroid = 1  # the planner has seen to it that there are enough; FAISS would only print
    index.train(np.ascontiguousarray(sample))
    return index


def nearest_lists(index: Any, features: FloatRows, n_probes: int) -> NDArray[np.int64]:
    """The `n_probes` lists nearest to each row, [N, P], nearest first."""
    _, lists = index.quantizer.search(np.ascontiguousarray(features), n_probes)
    return np.asarray(lists, dtype=np.int64)


def add_part(index: Any, features: FloatRows, lists: NDArray[np.int64]) -> Any:
    """The index with rows 0 to N - 1 added, each to the first of its nearest lists."""
    import faiss

    own = np.ascontiguousarray(lists[:, 0])
    given = np.ascontiguousarray(features)
    index.add_core(len(given), faiss.swig_ptr(given), None, faiss.swig_ptr(own))
    return index


def check_holds(index: Any, features: FloatRows, lists: NDArray[np.int64], path: Path) -> None:
    """Nothing; `DataError` unless rows from all over the index lie in their lists as these features, bit for bit."""
    import faiss

    for row in np.linspace(0, len(features) - 1, ROWS_CHECKED).astype(int):
        number = int(lists[row, 0])
        size = index.invlists.list_size(number)
        place = np.flatnonzero(faiss.rev_swig_ptr(index.invlists.get_ids(number), size) == row) if size else ()
        if len(place) == 1:
            codes = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * index.code_size).view(np.float32)
            if np.array_equal(codes.reshape(size, index.d)[place[0]], features[row]):
                continue
        raise DataError(
            f"{path} holds another vector than the features it is searched for have in row {row}: it is from another "
            "backbone, or from another part of the pool; remove its unit and run again"
        )


def merged(paths: Sequence[Path], empty: Any, first_rows: Sequence[int], on_disk: Path | None = None) -> Any:
    """One index over all parts, ids shifted by each part's first row; its lists in RAM, or in the file `on_disk`.

    In RAM it takes all vectors; on disk the system's file cache. The result finds what the parts find.
    """
    import faiss

    parts = [read_index(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part.d != empty.d or part.nlist != empty.nlist:
            raise DataError(
                f"{path} has {part.nlist} lists of width {part.d}, the quantiser {empty.nlist} of width {empty.d}; "
                "build all parts from one quantiser"
            )
    if on_disk is None:
        for part, first_row in zip(parts, first_rows, strict=True):
            empty.merge_from(part, first_row)
        return empty
    lists: Any = faiss.OnDiskInvertedLists(empty.nlist, empty.code_size, str(on_disk))
    pointers: Any = faiss
    ids = pointers.InvertedListsPtrVector()
    for part, first_row in zip(parts, first_rows, strict=True):
        _shift(part, first_row)
        ids.push_back(part.invlists)
    total = lists.merge_from_multiple(ids.data(), ids.size())
    empty.ntotal = total
    empty.replace_invlists(lists, True)
    lists.this.disown()
    return empty


def _shift(part: Any, by: int) -> None:
    """Add `by` to every id of the part, in place."""
    import faiss

    for number in range(part.nlist):
        if size := part.invlists.list_size(number):
            faiss.rev_swig_ptr(part.invlists.get_ids(number), size)[:] += by
