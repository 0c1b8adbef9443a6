"""Adjacency discrepancy (ADS): how far a sample disagrees with its neighbourhood, edge by edge, and the M+/M- split.

Shapes: N base rows, C classes, A anchors, E edges.

`alpha_NC` holds the base rows that the neighbours index. `anchor_alpha` holds the anchors; None says that anchor i
is base row i. An isolated anchor has no ADS: its mean terms are nan and it has no edges. Every public function raises
ValueError when an alpha is invalid (see `dirichlet.opinion`), has fewer than two classes, or does not fit the graph.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import softplus

from bd_core.checks import check_alpha, check_fraction, check_option
from bd_core.dirichlet import opinion
from bd_core.neighbourhood import Neighbourhoods

Sharpness = Literal["paper", "positive"]
Factor = Literal["sharpness", "divergence", "conflict"]
FACTORS: tuple[Factor, ...] = ("sharpness", "divergence", "conflict")
BLOCK_VALUES = 2**22  # edges are worked on this many numbers at a time, never as one E x C tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """Every edge of a graph as a pair: positive (M+, the anchor should agree with it) or negative (M-)."""

    anchor: Int64[Tensor, " E"]
    other: Int64[Tensor, " E"]  # a base row
    positive: Bool[Tensor, " E"]


def sharpness(
    alpha_NC: Float[Tensor, "N C"], neighbourhoods: Neighbourhoods, form: Sharpness = "paper"
) -> Float[Tensor, " A"]:
    """Sharp of every anchor, from its neighbours alone; nan if isolated.

    BD-Merging, ADS: Sharp(x_i) = E_j log(S_j / max_c alpha_jc - 1). It is negative once the neighbours' mean p_max is
    beyond about 0.5, and then turns conflicting neighbours into positives. `positive` is softplus of that mean (ours).
    """
    check_option(form, ("paper", "positive"), "form", "sharpness")
    _check_edges("sharpness", alpha_NC, neighbourhoods)
    top_N, class_N = alpha_NC.max(dim=1)
    rest_N = alpha_NC.scatter(1, class_N[:, None], 0).sum(dim=1)  # S - max would cancel where one class has nearly all
    log_odds_N = rest_N.log() - top_N.log()
    mean_A = _neighbour_mean(log_odds_N[neighbourhoods.neighbours], neighbourhoods)
    return softplus(mean_A) if form == "positive" else mean_A


def divergence(
    alpha_NC: Float[Tensor, "N C"], neighbourhoods: Neighbourhoods, anchor_alpha: Float[Tensor, "A C"] | None = None
) -> Float[Tensor, " A"]:
    """Div of every anchor, in [0, 2]; nan if isolated.

    BD-Merging, ADS: Div(x_i) = E_j |p_i - p_j|_1 with p = alpha / S.
    """
    anchor_alpha = _check_edges("divergence", alpha_NC, neighbourhoods, anchor_alpha)
    return _neighbour_mean(_distance(alpha_NC, neighbourhoods, anchor_alpha), neighbourhoods)


def conflict(
    alpha_NC: Float[Tensor, "N C"], neighbourhoods: Neighbourhoods, anchor_alpha: Float[Tensor, "A C"] | None = None
) -> Float[Tensor, " E"]:
    """Conf of every edge, in [0, 2] where alpha >= 1: two sure samples that disagree.

    BD-Merging, ADS: Conf(x_i, x_k) = sum_c |p_ic - p_kc| (1 - u_i) (1 - u_k).
    """
    anchor_alpha = _check_edges("conflict", alpha_NC, neighbourhoods, anchor_alpha)
    distance_E = _distance(alpha_NC, neighbourhoods, anchor_alpha)
    return distance_E * _certainty(alpha_NC, neighbourhoods, anchor_alpha)


def adjacency_discrepancy(
    alpha_NC: Float[Tensor, "N C"],
    neighbourhoods: Neighbourhoods,
    sharpness: Sharpness = "paper",
    anchor_alpha: Float[Tensor, "A C"] | None = None,
    factors: tuple[Factor, ...] = FACTORS,
) -> Float[Tensor, " E"]:
    """d of every edge.

    BD-Merging, ADS: d_ik = Sharp(x_i) Div(x_i) Conf(x_i, x_k) for k in A_r(i). `sharpness` is the form of Sharp,
    `factors` leaves some out, for ablations.
    """
    place = "adjacency_discrepancy"
    anchor_alpha = _check_edges(place, alpha_NC, neighbourhoods, anchor_alpha)
    if not factors or len(set(factors)) != len(factors):
        raise ValueError(f"{place}: factors = {factors}, needs one or more of {', '.join(FACTORS)}, each once")
    for factor in factors:
        check_option(factor, FACTORS, "factors", place)
    distance_E, anchor_E = _distance(alpha_NC, neighbourhoods, anchor_alpha), neighbourhoods.anchors()
    ads_E = torch.ones_like(distance_E)
    if "sharpness" in factors:
        ads_E *= _sharpness(alpha_NC, neighbourhoods, sharpness)[anchor_E]
    if "divergence" in factors:
        ads_E *= _neighbour_mean(distance_E, neighbourhoods)[anchor_E]
    if "conflict" in factors:
        ads_E *= distance_E * _certainty(alpha_NC, neighbourhoods, anchor_alpha)
    return ads_E


_sharpness = sharpness  # the argument of adjacency_discrepancy hides the function


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


def _neighbour_mean(value_E: Tensor, neighbourhoods: Neighbourhoods) -> Tensor:
    """E_j over A_r(i) for every anchor; nan if isolated. Adds in edge order, so that equal input gives equal bytes."""
    return torch.segment_reduce(value_E, "mean", lengths=neighbourhoods.degree)


def _distance(alpha_NC: Tensor, neighbourhoods: Neighbourhoods, anchor_alpha: Tensor) -> Tensor:
    """sum_c |p_ic - p_kc| of every edge."""
    p_NC, p_AC = alpha_NC / alpha_NC.sum(1, keepdim=True), anchor_alpha / anchor_alpha.sum(1, keepdim=True)
    size = max(1, BLOCK_VALUES // alpha_NC.shape[1])
    anchor_E, other_E = neighbourhoods.anchors(), neighbourhoods.neighbours
    distance_E = alpha_NC.new_empty(len(other_E))
    for block in (slice(start, start + size) for start in range(0, len(other_E), size)):
        distance_E[block] = (p_AC[anchor_E[block]] - p_NC[other_E[block]]).abs().sum(dim=1)
    return distance_E


def _certainty(alpha_NC: Tensor, neighbourhoods: Neighbourhoods, anchor_alpha: Tensor) -> Tensor:
    """(1 - u_i) (1 - u_k) of every edge."""
    sure_N, sure_A = 1 - opinion(alpha_NC).uncertainty, 1 - opinion(anchor_alpha).uncertainty
    return sure_A[neighbourhoods.anchors()] * sure_N[neighbourhoods.neighbours]


def _check_edges(
    place: str, alpha_NC: Tensor, neighbourhoods: Neighbourhoods, anchor_alpha: Tensor | None = None
) -> Tensor:
    """The alpha of the anchors, after checking that both alphas fit the graph."""
    check_alpha(alpha_NC, place, min_classes=2)
    n_anchors, neighbours = neighbourhoods.n_anchors, neighbourhoods.neighbours
    if len(neighbours) and int(neighbours.max()) >= len(alpha_NC):
        raise ValueError(
            f"{place}: a neighbour is row {int(neighbours.max())}, alpha has {len(alpha_NC)} rows; "
            "pass the alpha of every base row the graph was made with"
        )
    if anchor_alpha is None:
        if n_anchors > len(alpha_NC):
            raise ValueError(f"{place}: {n_anchors} anchors, {len(alpha_NC)} rows of alpha; pass anchor_alpha")
        return alpha_NC[:n_anchors]
    check_alpha(anchor_alpha, f"{place}, anchors", min_classes=2)
    if anchor_alpha.shape != (n_anchors, alpha_NC.shape[1]):
        raise ValueError(
            f"{place}: anchor_alpha has shape {tuple(anchor_alpha.shape)}, needs {(n_anchors, alpha_NC.shape[1])}; "
            "pass one row an anchor, over the same classes"
        )
    return anchor_alpha


def _check_ads(place: str, ads_E: Tensor) -> None:
    bad_E = ~torch.isfinite(ads_E)
    if bad_E.any():
        edge = int(bad_E.nonzero()[0])
        raise ValueError(f"{place}: ads[{edge}] = {ads_E[edge].item()}; check the alphas the discrepancy was made from")
