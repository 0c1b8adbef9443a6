"""Checks of input tensors, with one wording for all formulas: ValueError with the value, the place, the next step.

Shapes: N rows, C classes, D width.
"""

import torch
from torch import Tensor

NORM_TOLERANCE = 1e-3


def check_alpha(alpha: Tensor, place: str, *, min_classes: int = 1) -> None:
    """Nothing; raises unless alpha is [N >= 1, C >= min_classes], finite and above zero."""
    if alpha.ndim != 2 or alpha.shape[0] < 1 or alpha.shape[1] < min_classes:
        raise ValueError(
            f"{place}: alpha has shape {tuple(alpha.shape)}, needs [N >= 1, C >= {min_classes}]; "
            "pass one row of Dirichlet parameters a sample"
        )
    least, most = torch.aminmax(alpha)  # nan if any is; no mask of the size of alpha unless there is something to name
    if not (least > 0 and most < torch.inf):
        bad = ~(torch.isfinite(alpha) & (alpha > 0))
        row, column = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{place}: alpha[{row}, {column}] = {alpha[row, column].item()} ({int(bad.sum())} such values), needs "
            "finite values above 0; use alpha = evidence + 1 with evidence >= 0, and check the features for nan or inf"
        )


def check_features(features: Tensor, place: str) -> None:
    """Nothing; raises unless features is [N >= 1, D >= 1], finite, every row of length 1 within NORM_TOLERANCE."""
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(
            f"{place}: features have shape {tuple(features.shape)}, needs [N >= 1, D >= 1]; pass some rows"
        )
    norm_N = torch.linalg.vector_norm(features, dim=1)  # nan or inf anywhere in a row shows in its norm
    bad_N = ~((norm_N - 1).abs() <= NORM_TOLERANCE)
    if bad_N.any():
        row = int(bad_N.nonzero()[0])
        problem = "nan or inf" if not torch.isfinite(norm_N[row]) else "a length other than 1"
        raise ValueError(
            f"{place}: row {row} has {problem} (norm {norm_N[row].item():.6g}; {int(bad_N.sum())} of {len(norm_N)} "
            "rows are bad); drop broken rows, then use torch.nn.functional.normalize(features, dim=1)"
        )


def check_logits(logits: Tensor, place: str) -> None:
    """Nothing; raises unless logits is [B >= 1, C >= 1] and finite."""
    if logits.ndim != 2 or logits.numel() == 0:
        raise ValueError(f"{place}: logits have shape {tuple(logits.shape)}, needs [B >= 1, C >= 1]; pass some rows")
    bad = ~torch.isfinite(logits)
    if bad.any():
        row, column = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{place}: logits[{row}, {column}] = {logits[row, column].item()}, needs finite values; "
            "check the model's weights and inputs, or lower the learning rate"
        )


def check_fraction(value: float, name: str, place: str) -> None:
    """Nothing; raises unless 0 <= value <= 1."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{place}: {name} = {value}, needs a share between 0 and 1; correct {name}")


def check_option(value: str, options: tuple[str, ...], name: str, place: str) -> None:
    """Nothing; raises unless value is one of options."""
    if value not in options:
        raise ValueError(f"{place}: {name} = {value!r} is unknown; choose one of {', '.join(options)}")
