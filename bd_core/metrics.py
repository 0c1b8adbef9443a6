"""How good predictions are, and how far their confidence can be trusted.

Shapes: N samples. Means are taken in float64.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ReliabilityBins:
    """Mean confidence, accuracy and count of each bin of equal width; a bin without samples has nan, nan, 0."""

    confidence: Float64[Tensor, " bins"]
    accuracy: Float64[Tensor, " bins"]
    count: Int64[Tensor, " bins"]


def accuracy(predictions_N: Shaped[Tensor, " N"], labels_N: Shaped[Tensor, " N"]) -> float:
    """The share of predictions that equal the label; raises ValueError for no samples or two lengths."""
    _check_pair("accuracy", predictions_N, labels_N)
    return (predictions_N == labels_N).double().mean().item()


def relative_drop(clean: float, shifted: float) -> float:
    """(clean - shifted) / clean, the share of the clean accuracy that a shift costs; negative if the shift helps.

    Raises ValueError when clean is not above 0.
    """
    if not clean > 0:
        raise ValueError(f"relative_drop: clean = {clean}, needs an accuracy above 0; there is nothing to drop from")
    return (clean - shifted) / clean


def reliability_bins(
    confidence_N: Float[Tensor, " N"], correct_N: Bool[Tensor, " N"], bins: int = 15
) -> ReliabilityBins:
    """Confidence against accuracy in `bins` bins (b / bins, (b + 1) / bins], 0 in the first one.

    Raises ValueError for no samples, two lengths, a confidence outside [0, 1], or no bins.
    """
    _check_confidence("reliability_bins", confidence_N, correct_N)
    if bins < 1:
        raise ValueError(f"reliability_bins: bins = {bins}, needs at least 1; the default is 15")
    wide_N = confidence_N.double()
    bin_N = ((wide_N * bins).ceil().long() - 1).clamp_min(0)
    count = torch.bincount(bin_N, minlength=bins)
    return ReliabilityBins(
        confidence=torch.bincount(bin_N, wide_N, minlength=bins) / count,
        accuracy=torch.bincount(bin_N, correct_N.double(), minlength=bins) / count,
        count=count,
    )


def expected_calibration_error(
    confidence_N: Float[Tensor, " N"], correct_N: Bool[Tensor, " N"], bins: int = 15
) -> float:
    """ECE = sum over bins of (count / N) |accuracy - confidence| (Guo et al. 2017); errors as `reliability_bins`."""
    table = reliability_bins(confidence_N, correct_N, bins)
    gap = (table.accuracy - table.confidence).abs().nan_to_num(0)
    return ((gap * table.count).sum() / table.count.sum()).item()


def area_under_risk_coverage(confidence_N: Float[Tensor, " N"], correct_N: Bool[Tensor, " N"]) -> float:
    """AURC: mean over k of the error rate among the k most confident samples; 0 is best.

    Samples of equal confidence count as their mean (the expectation over their orders), so row order does not matter.
    Raises ValueError as `reliability_bins`.
    """
    _check_confidence("area_under_risk_coverage", confidence_N, correct_N)
    tie_N, count = _ties(confidence_N)
    tie_error = torch.bincount(tie_N, (~correct_N).double()) / count
    error_N = tie_error.flip(0).repeat_interleave(
        count.flip(0)
    )  # ties are in ascending order, coverage starts at the top
    covered_N = torch.arange(1, len(error_N) + 1, device=error_N.device)
    return (error_N.cumsum(0) / covered_N).mean().item()


def auroc(scores_N: Shaped[Tensor, " N"], positive_N: Bool[Tensor, " N"]) -> float:
    """The chance that a random positive scores above a random negative, ties counting one half (midranks).

    Raises ValueError for no samples, two lengths, a score that is nan or inf, or when one of the two kinds is missing.
    """
    _check_pair("auroc", scores_N, positive_N)
    _check_finite("auroc", scores_N)
    n_positive = int(positive_N.sum())
    n_negative = len(positive_N) - n_positive
    if n_positive == 0 or n_negative == 0:
        raise ValueError(f"auroc: {n_positive} positives, {n_negative} negatives; give at least one of each")
    tie_N, count = _ties(scores_N)
    midrank = count.cumsum(0) - (count - 1) / 2.0
    rank_sum = midrank.double()[tie_N][positive_N].sum().item()
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def _ties(value_N: Tensor) -> tuple[Tensor, Tensor]:
    """For every sample the index of its value among the distinct ones, ascending, and how many samples each has."""
    sorted_N, order_N = value_N.sort()
    tie_N = torch.zeros_like(order_N)
    tie_N[order_N[1:]] = (sorted_N.diff() != 0).cumsum(0)
    return tie_N, torch.bincount(tie_N)


def _check_pair(place: str, first_N: Tensor, second_N: Tensor) -> None:
    if first_N.ndim != 1 or first_N.shape != second_N.shape or len(first_N) == 0:
        shapes = f"{tuple(first_N.shape)} and {tuple(second_N.shape)}"
        raise ValueError(f"{place}: shapes are {shapes}, needs two of one length N >= 1; pass one value a sample")


def _check_finite(place: str, value_N: Tensor) -> None:
    bad_N = ~torch.isfinite(value_N)
    if bad_N.any():
        row = int(bad_N.nonzero()[0])
        raise ValueError(f"{place}: value {row} is {value_N[row].item()}; leave out samples without one and count them")


def _check_confidence(place: str, confidence_N: Tensor, correct_N: Tensor) -> None:
    _check_pair(place, confidence_N, correct_N)
    _check_finite(place, confidence_N)
    low, high = confidence_N.min().item(), confidence_N.max().item()
    if low < 0 or high > 1:
        raise ValueError(f"{place}: confidences are in [{low}, {high}], needs [0, 1]; pass probabilities, not logits")
