"""The join of two partitions: every edge from one to the other and back, by any back end, in both directions.

Shape letters: A rows of the first, B rows of the second partition, D width, E edges, P lists looked into.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd_core.neighbourhood import (
    Neighbourhoods,
    adaptive_min_cosine,
    radius_graph,
    radius_graph_between,
    rounding_bound,
)
from pipeline.formats.faiss_index import build_flat, kth_cosines, range_search, use_threads
from pipeline.neighbourhoods.border import settled, widened
from pipeline.neighbourhoods.csr import transposed, union
from pipeline.neighbourhoods.radius import Radius

Probes = NDArray[np.int64]


@dataclass(frozen=True)
class Side:
    """One partition in a join. IVF needs its index over these rows and the lists nearest to each of them, [rows, P]."""

    features: Tensor
    index: object = None
    probes: Probes | None = None


@dataclass(frozen=True)
class Joined:
    """Edges of the first partition's rows into the second, and back; None where the two are one.

    With an adaptive radius they are candidates: all that could be within it once every partition was looked at.
    """

    forward: Neighbourhoods
    backward: Neighbourhoods | None


def join(
    first: Side, second: Side | None, radius: Radius, device: torch.device, block_rows: int | None = None
) -> Joined:
    """The join of two partitions, or of one with itself (`second` is None)."""
    if radius.backend == "exact":
        return _exact(first, second, radius, device, block_rows)
    use_threads()
    if radius.backend == "ivf":
        return _ivf(first, second, radius)
    if radius.backend == "gpu":
        from pipeline.formats.faiss_gpu import range_search_gpu

        return _flat(first, second, radius, range_search_gpu)
    return _flat(first, second, radius, range_search)


def least_cosines(rows_AD: Tensor, base_BD: Tensor, radius: Radius, self_rows: Tensor | None = None) -> float | Tensor:
    """The radius to search the base with, of all rows or of each, as far as this base alone can tell."""
    if radius.mode == "global":
        return radius.min_cosine
    k = min(radius.target_degree, len(base_BD) - (self_rows is not None))
    return adaptive_min_cosine(rows_AD, k, base_BD, self_rows=self_rows) if k else 1.0


def _exact(first: Side, second: Side | None, radius: Radius, device: torch.device, block_rows: int | None) -> Joined:
    one = first.features.to(device)
    if second is None:
        least = least_cosines(one, one, radius, torch.arange(len(one), device=device))
        return Joined(_on_cpu(radius_graph(one, least, block_rows=block_rows)), None)
    other = second.features.to(device)
    least, other_least = least_cosines(one, other, radius), least_cosines(other, one, radius)
    forward, backward = radius_graph_between(one, other, least, other_least, block_rows=block_rows)
    return Joined(_on_cpu(forward), _on_cpu(backward))


Search = Callable[..., Neighbourhoods]


def _flat(first: Side, second: Side | None, radius: Radius, search: Search) -> Joined:
    if second is None:
        return Joined(_searched(first, first, radius, True, build_flat(first.features.numpy()), None, search), None)
    forward = _searched(first, second, radius, False, build_flat(second.features.numpy()), None, search)
    if radius.mode == "adaptive":
        index = build_flat(first.features.numpy())
        return Joined(forward, _searched(second, first, radius, False, index, None, search))
    return Joined(forward, transposed(forward, len(second.features)))


def _ivf(first: Side, second: Side | None, radius: Radius) -> Joined:
    """Both directions are searched, and an edge that either finds is an edge of both: what one misses is missed twice
    or not at all. With radii of their own the directions differ, and each stands for itself."""
    forward = _searched(first, second or first, radius, second is None, (second or first).index, first.probes)
    if second is None:
        if radius.mode == "adaptive":
            return Joined(forward, None)
        return Joined(union(forward, transposed(forward, len(first.features))), None)
    backward = _searched(second, first, radius, False, first.index, second.probes)
    if radius.mode == "adaptive":
        return Joined(forward, backward)
    both = union(forward, transposed(backward, len(first.features)))
    return Joined(both, transposed(both, len(second.features)))


def _searched(
    queries: Side,
    base: Side,
    radius: Radius,
    same: bool,
    index: object,
    probes: Probes | None,
    search: Search = range_search,
) -> Neighbourhoods:
    given = queries.features.numpy()
    own = np.arange(len(given)) if same else None
    chosen = None if probes is None else np.ascontiguousarray(probes[:, : radius.n_probes])
    if radius.mode == "adaptive":
        k = min(radius.target_degree + same, len(base.features))
        # Itself is among the nearest of a row that is in the base, though duplicates may come before it.
        slack = np.float32(2 * rounding_bound(given.shape[1]))
        least = np.clip(kth_cosines(index, given, k, chosen) - slack, -1, 1)
        return search(index, given, least, own, chosen)
    found = search(index, given, widened(radius.min_cosine, given.shape[1]), own, chosen)
    return settled(found, queries.features, base.features, radius.min_cosine)


def _on_cpu(graph: Neighbourhoods) -> Neighbourhoods:
    return Neighbourhoods(graph.offsets.cpu(), graph.neighbours.cpu(), graph.cosine.cpu())
