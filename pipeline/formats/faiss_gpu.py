"""Range search with FAISS on a GPU, where `faiss-gpu` is installed. Not measured: no machine of ours has had it.

No GPU index has a range search. k nearest neighbours are taken on the GPU, and the queries whose k-th still lies within
the radius, those that may have more, are completed on the CPU: exact whatever k is.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bd_core.neighbourhood import Neighbourhoods
from pipeline.errors import ConfigError
from pipeline.formats.faiss_index import FloatRows, graph_of, range_search

K = 1024  # GPU indexes give 2048 at most


def check_gpu() -> None:
    """`ConfigError` unless FAISS was built for GPUs and sees one."""
    import faiss

    if not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0:
        raise ConfigError(
            "index.backend gpu: this FAISS has no GPU (faiss-cpu, or no CUDA device); install the extra [gpu] on a "
            "machine with one, or take index.backend exact, which uses the GPU through torch"
        )


def range_search_gpu(
    index: Any,
    queries: FloatRows,
    min_cosine: float | NDArray[np.float32],
    self_rows: NDArray[np.int64] | None = None,
    probes: NDArray[np.int64] | None = None,
) -> Neighbourhoods:
    """As `range_search` on a flat index, with the k-NN on the first GPU."""
    check_gpu()
    import faiss

    on_gpu = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    return completed(on_gpu, index, queries, min_cosine, self_rows, min(K, index.ntotal))


def completed(
    knn: Any,
    index: Any,
    queries: FloatRows,
    min_cosine: float | NDArray[np.float32],
    self_rows: NDArray[np.int64] | None,
    k: int,
) -> Neighbourhoods:
    """The radius graph from `k` nearest neighbours of `knn`, completed on `index` where they end within it."""
    cosine, neighbours = knn.search(np.ascontiguousarray(queries), k)
    least = np.broadcast_to(np.asarray(min_cosine, dtype=np.float32), (len(queries),))
    within = cosine >= least[:, None]
    short = within[:, -1] & (k < index.ntotal)
    within &= ~short[:, None]
    if self_rows is not None:
        within &= neighbours != self_rows[:, None]
    anchors, place = within.nonzero()
    parts = [(anchors, neighbours[anchors, place], cosine[anchors, place])]
    if short.any():
        rows = short.nonzero()[0]
        rest = range_search(index, queries[rows], least[rows].copy(), None if self_rows is None else self_rows[rows])
        parts.append((rows[rest.anchors().numpy()], rest.neighbours.numpy(), rest.cosine.numpy()))
    anchors, found, cosines = (np.concatenate(each) for each in zip(*parts, strict=True))
    return graph_of(anchors, found, cosines, len(queries))
