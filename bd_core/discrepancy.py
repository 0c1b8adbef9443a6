"""Adjacency discrepancy (ADS): how far a sample disagrees with its neighbourhood, edge by edge, and the M+/M- split.

Shapes: N base rows, C classes, A anchors, E edges, F edges of a block of anchors.

`alpha_NC` holds the base rows that the neighbours index. `anchor_alpha` holds the anchors; None says that anchor i
is base row i. An isolated anchor has no ADS: its mean terms are nan and it has no edges. Every public function raises
ValueError when an alpha is invalid (see `dirichlet.opinion`), has fewer than two classes, or does not fit the graph.

Anchors are worked on in blocks, whole neighbourhoods at a time, so that what is held beside inputs, results and three
numbers a row stays within `budget_bytes`; ValueError names the number that would do where a neighbourhood does not fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import softplus

from bd_core.checks import check_alpha, check_fraction, check_option
from bd_core.edge_distance import distance_bytes, edge_distance
from bd_core.neighbourhood import Neighbourhoods

Sharpness = Literal["paper", "positive"]
Factor = Literal["sharpness", "divergence", "conflict"]
FACTORS: tuple[Factor, ...] = ("sharpness", "divergence", "conflict")
BUDGET_BYTES = 2**28
EDGE_BYTES = 64  # of the numbers held for an edge while its block is worked on


@dataclass(frozen=True, eq=False)
class Pairs:
    """Every edge of a graph as a pair: positive (M+, the anchor should agree with it) or negative (M-)."""

    anchor: Int64[Tensor, " E"]
    other: Int64[Tensor, " E"]  # a base row
    positive: Bool[Tensor, " E"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """alpha of rows, checked, and what every edge needs of a row beside it; made once for many graphs by `evidence`."""

    alpha: Float[Tensor, "N C"]
    scale: Float[Tensor, " N"]  # 1 / S
    log_odds: Float[Tensor, " N"]  # log(S / max_c alpha_c - 1)
    certainty: Float[Tensor, " N"]  # 1 - u

    def rows(self, rows: slice) -> "Evidence":
        """These rows alone."""
        return Evidence(self.alpha[rows], self.scale[rows], self.log_odds[rows], self.certainty[rows])


@dataclass(frozen=True, eq=False)
class Discrepancy:
    """d of every edge and what it is made of; the values of an isolated anchor are nan."""

    ads: Float[Tensor, " E"]
    sharpness: Float[Tensor, " A"]
    divergence: Float[Tensor, " A"]
    mean_ads: Float[Tensor, " A"]


def evidence(alpha_NC: Float[Tensor, "N C"], budget_bytes: int = BUDGET_BYTES, place: str = "evidence") -> Evidence:
    """What edges need of every row, in one pass over alpha."""
    check_alpha(alpha_NC, place, min_classes=2)
    strength_N, log_odds_N = alpha_NC.new_empty(len(alpha_NC)), alpha_NC.new_empty(len(alpha_NC))
    size = max(1, budget_bytes // (2 * alpha_NC.shape[1] * alpha_NC.element_size()))
    for rows in (slice(start, start + size) for start in range(0, len(alpha_NC), size)):
        block = alpha_NC[rows]
        top, class_ = block.max(dim=1)
        rest = block.scatter(1, class_[:, None], 0).sum(dim=1)  # S - max cancels where one class has nearly all
        strength_N[rows] = block.sum(dim=1)
        log_odds_N[rows] = rest.log() - top.log()
    return Evidence(alpha_NC, 1 / strength_N, log_odds_N, 1 - alpha_NC.shape[1] / strength_N)


def discrepancy(
    alpha_NC: Float[Tensor, "N C"] | Evidence,
    neighbourhoods: Neighbourhoods,
    sharpness: Sharpness = "paper",
    anchor_alpha: Float[Tensor, "A C"] | Evidence | None = None,
    factors: tuple[Factor, ...] = FACTORS,
    budget_bytes: int = BUDGET_BYTES,
) -> Discrepancy:
    """d of every edge, and Sharp, Div and mean d of every anchor, in one pass over the edges; without gradients.

    BD-Merging, ADS: d_ik = Sharp(x_i) Div(x_i) Conf(x_i, x_k) for k in A_r(i). `sharpness` is the form of Sharp,
    `factors` leaves some out of d, for ablations.
    """
    return _discrepancy("discrepancy", alpha_NC, neighbourhoods, sharpness, anchor_alpha, factors, budget_bytes)


def adjacency_discrepancy(
    alpha_NC: Float[Tensor, "N C"] | Evidence,
    neighbourhoods: Neighbourhoods,
    sharpness: Sharpness = "paper",
    anchor_alpha: Float[Tensor, "A C"] | Evidence | None = None,
    factors: tuple[Factor, ...] = FACTORS,
    budget_bytes: int = BUDGET_BYTES,
) -> Float[Tensor, " E"]:
    """d of every edge: `discrepancy` without the rest."""
    return _discrepancy(
        "adjacency_discrepancy", alpha_NC, neighbourhoods, sharpness, anchor_alpha, factors, budget_bytes
    ).ads


def sharpness(
    alpha_NC: Float[Tensor, "N C"] | Evidence,
    neighbourhoods: Neighbourhoods,
    form: Sharpness = "paper",
    budget_bytes: int = BUDGET_BYTES,
) -> Float[Tensor, " A"]:
    """Sharp of every anchor, from its neighbours alone; nan if isolated.

    BD-Merging, ADS: Sharp(x_i) = E_j log(S_j / max_c alpha_jc - 1). It is negative once the neighbours' mean p_max is
    beyond about 0.5, and then turns conflicting neighbours into positives. `positive` is softplus of that mean (ours).
    """
    check_option(form, ("paper", "positive"), "form", "sharpness")
    base, _ = _check_edges("sharpness", alpha_NC, neighbourhoods, None, budget_bytes)
    sharp_A = base.log_odds.new_empty(neighbourhoods.n_anchors)
    for anchors, edges in _blocks("sharpness", 0, neighbourhoods, budget_bytes):
        log_odds_F = base.log_odds[neighbourhoods.neighbours[edges]]
        sharp_A[anchors] = _sharp(log_odds_F, neighbourhoods.degree[anchors], form)
    return sharp_A


def divergence(
    alpha_NC: Float[Tensor, "N C"] | Evidence,
    neighbourhoods: Neighbourhoods,
    anchor_alpha: Float[Tensor, "A C"] | Evidence | None = None,
    budget_bytes: int = BUDGET_BYTES,
) -> Float[Tensor, " A"]:
    """Div of every anchor, in [0, 2]; nan if isolated.

    BD-Merging, ADS: Div(x_i) = E_j |p_i - p_j|_1 with p = alpha / S.
    """
    return _discrepancy("divergence", alpha_NC, neighbourhoods, "paper", anchor_alpha, FACTORS, budget_bytes).divergence


def conflict(
    alpha_NC: Float[Tensor, "N C"] | Evidence,
    neighbourhoods: Neighbourhoods,
    anchor_alpha: Float[Tensor, "A C"] | Evidence | None = None,
    budget_bytes: int = BUDGET_BYTES,
) -> Float[Tensor, " E"]:
    """Conf of every edge, in [0, 2] where alpha >= 1: two sure samples that disagree.

    BD-Merging, ADS: Conf(x_i, x_k) = sum_c |p_ic - p_kc| (1 - u_i) (1 - u_k).
    """
    return _discrepancy("conflict", alpha_NC, neighbourhoods, "paper", anchor_alpha, ("conflict",), budget_bytes).ads


def negative_sharpness_share(sharp_A: Float[Tensor, " A"]) -> float:
    """The share of anchors with Sharp < 0 among those with neighbours, for which the split is inverted; nan if none."""
    has_neighbours_A = ~sharp_A.isnan()
    return (sharp_A < 0).sum().item() / n if (n := int(has_neighbours_A.sum())) else float("nan")


def positive_quantile(ads_E: Float[Tensor, " E"], q: float) -> float:
    """The epsilon below which a share q of the edges lies, linear between two edges (ours: the paper's is unpublished).

    Raises ValueError when there are no edges, one is not finite, or q is outside [0, 1].
    """
    check_fraction(q, "q", "positive_quantile")
    _check_ads("positive_quantile", ads_E)
    if len(ads_E) == 0:
        raise ValueError("positive_quantile: there are no edges; lower min_cosine until samples have neighbours")
    low, part = divmod(q * (len(ads_E) - 1), 1)
    sorted_E = ads_E.sort().values  # torch.quantile stops at 16 million values
    first, second = sorted_E[int(low)].item(), sorted_E[min(int(low) + 1, len(ads_E) - 1)].item()
    return first + part * (second - first)


def split_pairs(ads_E: Float[Tensor, " E"], neighbourhoods: Neighbourhoods, epsilon: float) -> Pairs:
    """Every edge as a positive or a negative pair.

    BD-Merging: M+(i) = {k : d_ik < epsilon}, M-(i) = {k : d_ik >= epsilon}; epsilon is compared in the dtype of ads.

    Raises ValueError when ads does not fit the graph, or it or epsilon is not finite.
    """
    _check_ads("split_pairs", ads_E)
    if ads_E.shape != neighbourhoods.neighbours.shape or not -torch.inf < epsilon < torch.inf:
        raise ValueError(
            f"split_pairs: {len(ads_E)} discrepancies for {len(neighbourhoods.neighbours)} edges, epsilon = {epsilon}; "
            "pass adjacency_discrepancy of the same graph and a finite epsilon"
        )
    threshold = ads_E.new_tensor(epsilon)
    return Pairs(neighbourhoods.anchors(), neighbourhoods.neighbours, ads_E < threshold)


@torch.no_grad()
def _discrepancy(
    place: str,
    alpha_NC: Tensor | Evidence,
    neighbourhoods: Neighbourhoods,
    form: str,
    anchor_alpha: Tensor | Evidence | None,
    factors: tuple[str, ...],
    budget_bytes: int,
) -> Discrepancy:
    if not factors or len(set(factors)) != len(factors):
        raise ValueError(f"{place}: factors = {factors}, needs one or more of {', '.join(FACTORS)}, each once")
    for factor in factors:
        check_option(factor, FACTORS, "factors", place)
    check_option(form, ("paper", "positive"), "form", "sharpness")
    base, own = _check_edges(place, alpha_NC, neighbourhoods, anchor_alpha, budget_bytes)
    ads_E = base.alpha.new_empty(len(neighbourhoods.neighbours))
    sharp_A, div_A, mean_A = (ads_E.new_empty(neighbourhoods.n_anchors) for _ in range(3))
    row_bytes = distance_bytes(own.alpha, base.alpha)
    _, gather = _shares(row_bytes, budget_bytes)
    for anchors, edges in _blocks(place, row_bytes, neighbourhoods, budget_bytes):
        other_F, degree = neighbourhoods.neighbours[edges], neighbourhoods.degree[anchors]
        offsets, mine = neighbourhoods.offsets[anchors.start : anchors.stop + 1], own.rows(anchors)
        distance_F = edge_distance(
            mine.alpha, base.alpha, mine.scale, base.scale, offsets, neighbourhoods.neighbours, gather
        )
        sharp_A[anchors] = _sharp(base.log_odds[other_F], degree, form)
        div_A[anchors] = _neighbour_mean(distance_F, degree)
        # Within an anchor only Conf differs; the others are one number.
        whole = torch.ones_like(div_A[anchors])
        if "sharpness" in factors:
            whole *= sharp_A[anchors]
        if "divergence" in factors:
            whole *= div_A[anchors]
        if "conflict" in factors:
            whole *= mine.certainty
            distance_F *= base.certainty[other_F]
        else:
            distance_F.fill_(1)
        distance_F *= torch.repeat_interleave(whole, degree)
        ads_E[edges] = distance_F
        mean_A[anchors] = _neighbour_mean(distance_F, degree)
    return Discrepancy(ads_E, sharp_A, div_A, mean_A)


def _blocks(
    place: str, row_bytes: int, neighbourhoods: Neighbourhoods, budget_bytes: int
) -> Iterator[tuple[slice, slice]]:
    """Anchors and their edges, as many whole neighbourhoods at a time as the budget takes."""
    offsets, hub = neighbourhoods.offsets, max(1, int(neighbourhoods.degree.max()))
    edge_budget, gather = _shares(row_bytes, budget_bytes)
    if hub * EDGE_BYTES > edge_budget or gather < 1:
        needed = (2 if row_bytes else 1) * max(hub * EDGE_BYTES, row_bytes)
        raise ValueError(
            f"{place}: budget_bytes = {budget_bytes} does not hold the largest neighbourhood, {hub} edges; "
            f"give at least {needed}, or raise min_cosine"
        )
    first = 0
    while first < neighbourhoods.n_anchors:
        reach = offsets[first] + edge_budget // EDGE_BYTES
        last = int(torch.searchsorted(offsets, reach, right=True)) - 1
        yield slice(first, last), slice(int(offsets[first]), int(offsets[last]))
        first = last


def _shares(row_bytes: int, budget_bytes: int) -> tuple[int, int]:
    """Bytes for the numbers of a block of edges, and how many edges' rows may be gathered at a time beside them."""
    return (budget_bytes // 2, budget_bytes // 2 // row_bytes) if row_bytes else (budget_bytes, 1)


def _sharp(log_odds_F: Tensor, degree: Tensor, form: str) -> Tensor:
    mean = _neighbour_mean(log_odds_F, degree)
    return softplus(mean) if form == "positive" else mean


def _neighbour_mean(value_F: Tensor, degree: Tensor) -> Tensor:
    """E_j over A_r(i) for each anchor; nan if isolated. Adds in edge order, so that equal input gives equal bytes."""
    return torch.segment_reduce(value_F.double(), "mean", lengths=degree).to(value_F.dtype)


def _check_edges(
    place: str,
    alpha_NC: Tensor | Evidence,
    neighbourhoods: Neighbourhoods,
    anchor_alpha: Tensor | Evidence | None,
    budget_bytes: int,
) -> tuple[Evidence, Evidence]:
    """Evidence of the base rows and of the anchors, after checking that both fit the graph."""
    base = alpha_NC if isinstance(alpha_NC, Evidence) else evidence(alpha_NC, budget_bytes, place)
    n_rows, n_classes = base.alpha.shape
    n_anchors, neighbours = neighbourhoods.n_anchors, neighbourhoods.neighbours
    if len(neighbours) and int(neighbours.max()) >= n_rows:
        raise ValueError(
            f"{place}: a neighbour is row {int(neighbours.max())}, alpha has {n_rows} rows; "
            "pass the alpha of every base row the graph was made with"
        )
    if anchor_alpha is None:
        if n_anchors > n_rows:
            raise ValueError(f"{place}: {n_anchors} anchors, {n_rows} rows of alpha; pass anchor_alpha")
        return base, base.rows(slice(n_anchors))
    if isinstance(anchor_alpha, Tensor):
        anchor_alpha = evidence(anchor_alpha, budget_bytes, f"{place}, anchors")
    if anchor_alpha.alpha.shape != (n_anchors, n_classes):
        raise ValueError(
            f"{place}: anchor_alpha has shape {tuple(anchor_alpha.alpha.shape)}, needs {(n_anchors, n_classes)}; "
            "pass one row an anchor, over the same classes"
        )
    return base, anchor_alpha


def _check_ads(place: str, ads_E: Tensor) -> None:
    bad_E = ~torch.isfinite(ads_E)
    if bad_E.any():
        edge = int(bad_E.nonzero()[0])
        raise ValueError(f"{place}: ads[{edge}] = {ads_E[edge].item()}; check the alphas the discrepancy was made from")
