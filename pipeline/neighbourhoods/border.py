"""Edges on the border of the radius, settled for FAISS as `bd_core` settles its own: by the exact cosine.

float32 products differ in their last bits with the library, the threads and the shape of a block, so a pair on the
radius could be an edge of one back end and none of another. So FAISS searches a little further than the radius, and
pairs near it are made again. Shape letters: A anchors, M base rows, D width, E edges.
"""

import torch
from torch import Tensor

from bd_core.neighbourhood import Neighbourhoods, exact_cosine, rounding_bound
from pipeline.neighbourhoods.csr import kept


def widened(min_cosine: float, width: int) -> float:
    """The radius to search with, before `settled`."""
    return max(-1.0, min_cosine - 2 * rounding_bound(width))


def settled(graph: Neighbourhoods, anchors_AD: Tensor, base_MD: Tensor, min_cosine: float) -> Neighbourhoods:
    """The edges whose exact cosine is >= min_cosine (as float32), of a graph that was found with the widened radius."""
    least = torch.tensor(min_cosine, dtype=torch.float32)
    near_E = ((graph.cosine - least).abs() <= 2 * rounding_bound(anchors_AD.shape[1])).nonzero()[:, 0]
    keep_E = torch.ones(len(graph.cosine), dtype=torch.bool)
    exact = exact_cosine(anchors_AD, base_MD, graph.anchors()[near_E], graph.neighbours[near_E])
    keep_E[near_E] = exact >= least
    return graph if keep_E.all() else kept(graph, keep_E)
