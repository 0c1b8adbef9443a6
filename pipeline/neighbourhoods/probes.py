"""How many lists must be looked into, and how fast this machine multiplies.

Shape letters: N rows, D width, L lists, E edges.
"""

from time import perf_counter

import torch
from torch import Tensor

from bd_core.neighbourhood import Neighbourhoods

PROBED = (1024, 8192)  # queries and base rows of the product that is timed
BLOCK = 1024
MARGIN = 0.25  # of the edges that may be missed, kept for what the sample does not show


def probes_needed(
    exact: Neighbourhoods, queries: Tensor, base_ND: Tensor, centroids_LD: Tensor, *, min_recall: float, mutual: bool
) -> int:
    """The fewest lists to look into that find `min_recall` of these edges, as a power of two, at most all.

    IVF finds an edge when its end's list is among those its anchor looks into, so the rank of that list among the
    anchor's is all there is to know. `mutual`: an edge found from either end counts, as in a join of two partitions.
    """
    if not len(exact.neighbours):
        return 1
    ends, place_E = torch.unique(exact.neighbours, return_inverse=True)
    anchor_E = exact.anchors()
    rank_E = _ranks(queries, anchor_E, _nearest(base_ND[ends], centroids_LD)[place_E], centroids_LD)
    if mutual:
        rank_E = rank_E.minimum(_ranks(base_ND[ends], place_E, _nearest(queries, centroids_LD)[anchor_E], centroids_LD))
    wanted = min_recall + MARGIN * (1 - min_recall)
    place = min(len(rank_E) - 1, int(wanted * len(rank_E)))
    needed = 1 + int(rank_E.sort().values[place])
    return min(len(centroids_LD), 1 << (needed - 1).bit_length())


def _nearest(rows_ND: Tensor, centroids_LD: Tensor) -> Tensor:
    starts = range(0, len(rows_ND), BLOCK)
    return torch.cat([(rows_ND[start : start + BLOCK] @ centroids_LD.T).argmax(dim=1) for start in starts])


def _ranks(rows_ND: Tensor, row_E: Tensor, list_E: Tensor, centroids_LD: Tensor) -> Tensor:
    """How many lists are nearer to the row of each edge than the list of the edge."""
    rank_E = torch.empty_like(list_E)
    for start in range(0, len(rows_ND), BLOCK):
        here_E = ((row_E >= start) & (row_E < start + BLOCK)).nonzero()[:, 0]
        near = rows_ND[start : start + BLOCK] @ centroids_LD.T
        order = near.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order).contiguous())
        rank_E[here_E] = rank[row_E[here_E] - start, list_E[here_E]]
    return rank_E


def measured_flops(width: int, threads: int, device: torch.device, rounds: int = 3) -> float:
    """Operations a second of a product such as the exact graph is made of: the best of a few, some 10 ms each."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        one, other = (torch.full((rows, width), 0.01, device=device) for rows in PROBED)
        best = float("inf")
        for _ in range(rounds + 1):
            start = perf_counter()
            float((one @ other.T)[-1, -1])  # reading a number waits for the device
            best = min(best, perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 2 * PROBED[0] * PROBED[1] * width / best
