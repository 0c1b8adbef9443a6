"""The signals of every anchor and the ADS of every edge, with the far ends' evidence made block by block.

Shape letters: A anchors, N rows of the pool that a block has edges to, C classes, E edges.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from bd_core.discrepancy import FACTORS, Discrepancy, Factor, Sharpness, discrepancy
from bd_core.head import EvidentialHead
from bd_core.huge_pages import empty
from bd_core.neighbourhood import Neighbourhoods
from pipeline.neighbourhoods.csr import rows_of

ROWS_AT_ONCE = 8192  # rows whose evidence is made together


class Rows(Protocol):
    """A pool, as far as scores need it."""

    def features_at(self, rows_R: NDArray[np.int64]) -> Tensor:
        """float32 [R, D] of these rows, ascending."""


def score_anchors(
    pool: Rows,
    head: EvidentialHead,
    anchor_alpha_AC: Tensor,
    graph: Neighbourhoods,
    *,
    sharpness: Sharpness = "positive",
    factors: tuple[Factor, ...] = FACTORS,
    budget_bytes: int,
) -> Discrepancy:
    """Sharp, Div and mean ADS of the anchors, and ADS of their edges; neighbours are rows of the pool.

    Half of `budget_bytes` is for the evidence of a block of edges, half for the formulas, so that neither the graph nor
    a hub decides what is held. An anchor with more edges than a block takes goes through in pieces; its means are put
    together in float64.
    """
    share = budget_bytes // 2
    at_once = max(1, share // edge_bytes(anchor_alpha_AC.shape[1]))
    found = []
    for anchors in _blocks(graph, at_once):
        block, alpha_AC = rows_of(graph, torch.arange(anchors.start, anchors.stop)), anchor_alpha_AC[anchors]
        if len(block.neighbours) > at_once:
            found.append(_hub(pool, head, alpha_AC, block, at_once, sharpness, factors, share))
        else:
            found.append(_scored(pool, head, alpha_AC, block, sharpness, factors, share))
    names = ("ads", "sharpness", "divergence", "mean_ads")
    return Discrepancy(*(torch.cat([getattr(each, name) for each in found]) for name in names))


def edge_bytes(n_classes: int) -> int:
    """An edge's far end in memory, were each edge to another row: its logits, and the evidence made of them."""
    return 3 * 4 * n_classes


def _scored(
    pool: Rows,
    head: EvidentialHead,
    anchor_alpha_AC: Tensor,
    block: Neighbourhoods,
    sharpness: Sharpness,
    factors: tuple[Factor, ...],
    budget_bytes: int,
) -> Discrepancy:
    rows, neighbours = torch.unique(block.neighbours, return_inverse=True)
    # The formulas want a base even where there is no edge to one.
    alpha_NC = _evidence(pool, head, rows.numpy()) if len(rows) else anchor_alpha_AC[:1]
    compact = Neighbourhoods(block.offsets, neighbours, block.cosine)
    return discrepancy(alpha_NC, compact, sharpness, anchor_alpha_AC, factors, budget_bytes)


def _hub(
    pool: Rows,
    head: EvidentialHead,
    anchor_alpha_1C: Tensor,
    block: Neighbourhoods,
    at_once: int,
    sharpness: Sharpness,
    factors: tuple[Factor, ...],
    budget_bytes: int,
) -> Discrepancy:
    """One anchor's: Conf of its edges piece by piece, Sharp and Div as means over all of them."""
    n_edges = len(block.neighbours)
    conflict_E = block.cosine.new_empty(n_edges, dtype=anchor_alpha_1C.dtype)
    sharp = div = torch.zeros(1, dtype=torch.float64)
    for start in range(0, n_edges, at_once):
        some = slice(start, start + at_once)
        neighbours = block.neighbours[some]
        piece = Neighbourhoods(torch.tensor([0, len(neighbours)]), neighbours, block.cosine[some])
        part = _scored(pool, head, anchor_alpha_1C, piece, "paper", ("conflict",), budget_bytes)
        conflict_E[some] = part.ads
        sharp = sharp + part.sharpness.double() * len(neighbours) / n_edges
        div = div + part.divergence.double() * len(neighbours) / n_edges
    sharp = softplus(sharp) if sharpness == "positive" else sharp
    ads_E = conflict_E if "conflict" in factors else torch.ones_like(conflict_E)
    for value, factor in ((sharp, "sharpness"), (div, "divergence")):
        if factor in factors:
            ads_E *= value.to(ads_E.dtype)
    mean = ads_E.double().mean(0, keepdim=True)
    return Discrepancy(ads_E, *(each.to(ads_E.dtype) for each in (sharp, div, mean)))


def _evidence(pool: Rows, head: EvidentialHead, rows: NDArray[np.int64]) -> Tensor:
    """alpha [N, C] of these rows, where reading rows in no order is cheapest."""
    alpha_NC = empty((len(rows), len(head.weight)), head.weight.dtype)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        alpha_NC[some] = head(pool.features_at(rows[some]))
    return alpha_NC


def _blocks(graph: Neighbourhoods, edges: int) -> Iterator[slice]:
    """Runs of anchors with at most so many edges; an anchor that has more is a run of its own."""
    start = 0
    while start < graph.n_anchors:
        room = int(graph.offsets[start]) + edges
        stop = int(torch.searchsorted(graph.offsets, room, right=True)) - 1
        yield slice(start, max(stop, start + 1))
        start = max(stop, start + 1)
