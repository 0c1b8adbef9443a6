"""What is done to neighbourhoods in CSR form between their search and their files.

Shape letters: A anchors, E edges, M rows of the base.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bd_core.neighbourhood import Neighbourhoods
from bd_core.radius_choice import ROUNDING


def from_edges(anchor_E: Tensor, neighbour_E: Tensor, cosine_E: Tensor, n_anchors: int) -> Neighbourhoods:
    """The graph of these edges in any order; an edge that is given twice is one."""
    order = torch.argsort(neighbour_E, stable=True)
    order = order[torch.argsort(anchor_E[order], stable=True)]
    anchor_E, neighbour_E, cosine_E = anchor_E[order], neighbour_E[order], cosine_E[order]
    first_E = torch.ones(len(order), dtype=torch.bool)
    first_E[1:] = (anchor_E.diff() != 0) | (neighbour_E.diff() != 0)
    return Neighbourhoods(offsets_of(anchor_E[first_E], n_anchors), neighbour_E[first_E], cosine_E[first_E])


def offsets_of(anchor_E: Tensor, n_anchors: int) -> Tensor:
    """int64 [A + 1] for anchors that ascend."""
    degree = torch.bincount(anchor_E, minlength=n_anchors)
    return torch.cat([degree.new_zeros(1), degree.cumsum(0)])


def transposed(graph: Neighbourhoods, n_rows: int) -> Neighbourhoods:
    """The same edges seen from the base [M rows]: its rows are the anchors, the anchors are the neighbours."""
    order = torch.argsort(graph.neighbours, stable=True)  # anchors ascend already, and a stable sort keeps that
    return Neighbourhoods(
        offsets_of(graph.neighbours[order], n_rows), graph.anchors()[order], graph.cosine[order].contiguous()
    )


def union(one: Neighbourhoods, other: Neighbourhoods) -> Neighbourhoods:
    """Every edge that one of two graphs over the same anchors has; where both have it, the first one's cosine."""
    return from_edges(
        torch.cat([one.anchors(), other.anchors()]),
        torch.cat([one.neighbours, other.neighbours]),
        torch.cat([one.cosine, other.cosine]),
        one.n_anchors,
    )


def kept(graph: Neighbourhoods, keep_E: Tensor) -> Neighbourhoods:
    """The graph with only the edges that `keep_E` marks."""
    return Neighbourhoods(
        offsets_of(graph.anchors()[keep_E], graph.n_anchors), graph.neighbours[keep_E], graph.cosine[keep_E]
    )


class Csr(NamedTuple):
    """The tensors of a graph, as `Neighbourhoods` has them, not yet checked: parts of one that will be."""

    offsets: Tensor
    neighbours: Tensor
    cosine: Tensor


def side_by_side(parts: Sequence[tuple[Neighbourhoods | Csr, int]]) -> Neighbourhoods:
    """One graph over the same anchors, whose base is the parts' bases one after the other; an offset for each part."""
    n_anchors = len(parts[0][0].offsets) - 1
    degree_PA = torch.cat([graph.offsets.diff() for graph, _ in parts])
    anchor_E = torch.repeat_interleave(torch.arange(n_anchors).repeat(len(parts)), degree_PA)
    order = torch.argsort(anchor_E, stable=True)  # parts come in the order of their rows, so neighbours stay ascending
    neighbours = torch.cat([graph.neighbours + first_row for graph, first_row in parts])
    cosine = torch.cat([graph.cosine for graph, _ in parts])
    return Neighbourhoods(offsets_of(anchor_E, n_anchors), neighbours[order], cosine[order])


def nearest(graph: Neighbourhoods, k: int, tolerance: float = 0.0) -> Neighbourhoods:
    """Every anchor's `k` nearest neighbours, those within `tolerance` of the k-th too; ties by the lower row."""
    anchor_E = graph.anchors()
    order = torch.argsort(graph.cosine, stable=True, descending=True)
    order = order[torch.argsort(anchor_E[order], stable=True)]
    rank_E = torch.empty_like(order)
    rank_E[order] = torch.arange(len(order)) - graph.offsets[anchor_E]
    keep_E = rank_E < k
    if tolerance:
        least_A = torch.full((graph.n_anchors,), -torch.inf)
        at_k_E = rank_E == k - 1
        least_A[anchor_E[at_k_E]] = graph.cosine[at_k_E] - tolerance
        keep_E = graph.cosine >= least_A[anchor_E]
    return kept(graph, keep_E)


def within_adaptive_radius(graph: Neighbourhoods, target_degree: int) -> Neighbourhoods:
    """Of candidates the edges within each anchor's own radius, as `bd_core.adaptive_min_cosine` sets it."""
    return nearest(graph, target_degree, tolerance=ROUNDING)


def rows_of(graph: Neighbourhoods, rows_R: Tensor) -> Neighbourhoods:
    """The neighbourhoods of these anchors alone, in the order given."""
    degree_R = graph.degree[rows_R]
    offsets = torch.cat([degree_R.new_zeros(1), degree_R.cumsum(0)])
    place_E = torch.arange(int(offsets[-1])) + torch.repeat_interleave(graph.offsets[rows_R] - offsets[:-1], degree_R)
    return Neighbourhoods(offsets, graph.neighbours[place_E], graph.cosine[place_E])


def edges_shared(exact: Neighbourhoods, found: Neighbourhoods) -> int:
    """How many edges of the exact graph `found` has too."""
    if not len(exact.neighbours):
        return 0
    stride = 1 + max(int(graph.neighbours.max()) if len(graph.neighbours) else 0 for graph in (exact, found))
    wanted, present = (graph.anchors() * stride + graph.neighbours for graph in (exact, found))
    return int(torch.isin(wanted, present).sum())
