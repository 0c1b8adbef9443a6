"""Scores of anchors with the far ends' evidence made in pieces: what a budget splits changes nothing."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from bd_core.discrepancy import FACTORS, Discrepancy, Factor, Sharpness, discrepancy
from bd_core.head import EvidentialHead
from bd_core.neighbourhood import Neighbourhoods, radius_graph
from pipeline.stages.anchor_scores import edge_bytes, score_anchors

N_ROWS, WIDTH, CLASSES = 90, 8, 20
AMPLE = 2**26
FORMS: tuple[Sharpness, ...] = ("paper", "positive")
SOME: tuple[tuple[Factor, ...], ...] = (FACTORS, ("conflict",), ("sharpness", "divergence"))


class Held:
    """Rows in memory, and the most that were asked for at once."""

    def __init__(self, features_ND: Tensor) -> None:
        self.features_ND, self.most = features_ND, 0

    def features_at(self, rows_R: NDArray[np.int64]) -> Tensor:
        assert (np.diff(rows_R) > 0).all()
        self.most = max(self.most, len(rows_R))
        return self.features_ND[torch.from_numpy(rows_R)]


def case() -> tuple[Held, EvidentialHead, Tensor, Neighbourhoods]:
    """Row 0 is near all others; the last is near nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(N_ROWS, WIDTH, generator=generator)
    rows[:, 0] = 0
    rows[1:-1, 0] = 1.2 * rows[1:-1].norm(dim=1)
    rows[0], rows[-1] = torch.eye(WIDTH)[0], -torch.eye(WIDTH)[0]
    features = torch.nn.functional.normalize(rows, dim=1)
    head = EvidentialHead(torch.nn.functional.normalize(torch.randn(CLASSES, WIDTH, generator=generator), dim=1))
    graph = radius_graph(features, 0.75)
    assert int(graph.degree[0]) == N_ROWS - 2 and int(graph.degree[-1]) == 0
    with torch.no_grad():
        return Held(features), head, head(features), graph


@pytest.mark.parametrize("factors", SOME, ids="-".join)
@pytest.mark.parametrize("form", FORMS)
def test_a_hub_in_pieces_scores_as_it_does_whole(form: Sharpness, factors: tuple[Factor, ...]) -> None:
    pool, head, alpha, graph = case()
    with torch.no_grad():
        small = score_anchors(
            pool, head, alpha, graph, sharpness=form, factors=factors, budget_bytes=2 * 16 * edge_bytes(CLASSES)
        )
    assert pool.most <= 16  # edges that half the budget takes
    expected = discrepancy(alpha, graph, form, factors=factors, budget_bytes=AMPLE)
    _same(small, expected)


def test_one_edge_at_a_time_is_the_least_budget() -> None:
    pool, head, alpha, graph = case()
    with torch.no_grad(), pytest.raises(ValueError, match="budget_bytes = 1 does not hold the largest neighbourhood"):
        score_anchors(pool, head, alpha, graph, budget_bytes=2)


def test_without_any_edge_there_are_no_signals() -> None:
    pool, head, alpha, _ = case()
    empty = Neighbourhoods(
        torch.zeros(N_ROWS + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0)
    )
    with torch.no_grad():
        found = score_anchors(pool, head, alpha, empty, budget_bytes=AMPLE)
    assert not len(found.ads) and found.sharpness.isnan().all() and found.mean_ads.isnan().all()


def _same(found: Discrepancy, expected: Discrepancy) -> None:
    for name in ("ads", "sharpness", "divergence", "mean_ads"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6, equal_nan=True)
