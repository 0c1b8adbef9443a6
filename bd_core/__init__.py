"""The mathematics of BD-Merging: tensors in, tensors out, nothing else."""

from bd_core.dirichlet import Opinion, iec, kl_to_uniform, opinion
from bd_core.discrepancy import (
    Pairs,
    adjacency_discrepancy,
    conflict,
    divergence,
    negative_sharpness_share,
    positive_quantile,
    sharpness,
    split_pairs,
)
from bd_core.head import Calibration, EvidentialHead
from bd_core.label_space import LabelSpace, canonical_name, unify_heads, unify_labels
from bd_core.losses import (
    discrepancy_contrastive_loss,
    evidential_loss,
    head_loss,
    information_maximisation,
    inverse_loss,
    prediction_entropy,
    unsupervised_loss,
)
from bd_core.merged import MergedModel
from bd_core.methods import METHODS, merge
from bd_core.metrics import (
    ReliabilityBins,
    accuracy,
    area_under_risk_coverage,
    auroc,
    expected_calibration_error,
    relative_drop,
    reliability_bins,
)
from bd_core.neighbourhood import Neighbourhoods, adaptive_min_cosine, calibrate_min_cosine, radius_graph
from bd_core.router import Router
from bd_core.task_vectors import TaskVectors, task_vectors

__all__ = [
    "METHODS",
    "Calibration",
    "EvidentialHead",
    "LabelSpace",
    "MergedModel",
    "Neighbourhoods",
    "Opinion",
    "Pairs",
    "ReliabilityBins",
    "Router",
    "TaskVectors",
    "accuracy",
    "adaptive_min_cosine",
    "adjacency_discrepancy",
    "area_under_risk_coverage",
    "auroc",
    "calibrate_min_cosine",
    "canonical_name",
    "conflict",
    "discrepancy_contrastive_loss",
    "divergence",
    "evidential_loss",
    "expected_calibration_error",
    "head_loss",
    "iec",
    "information_maximisation",
    "inverse_loss",
    "kl_to_uniform",
    "merge",
    "negative_sharpness_share",
    "opinion",
    "positive_quantile",
    "prediction_entropy",
    "radius_graph",
    "relative_drop",
    "reliability_bins",
    "sharpness",
    "split_pairs",
    "task_vectors",
    "unify_heads",
    "unify_labels",
    "unsupervised_loss",
]
