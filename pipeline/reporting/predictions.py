"""Per-image outcomes: which predictions were right, paired differences, and the risk at each coverage.

Labels are read here and in `pairs` only to judge what was fitted without them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.reporting.parts import Parts, numbers_of, read_table
from pipeline.reporting.results import CLEAN

Floats = np.ndarray[Any, np.dtype[np.float64]]
Names = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Outcomes:
    """One model's labelled test images, one row for each image, level and corruption; `image` holds its task."""

    image: Names
    level: Names
    confidence: Floats
    correct: Floats


Predictions = Mapping[str, Outcomes]
SUFFIXES = {"task_known": "", "task_free": "_free"}


def image_keys(table: pa.Table) -> pa.Array:
    """`task`, unit separator, `sample_id`: the identity of an image across stages (one image may serve two tasks)."""
    columns = [pc.cast(table.column(name), pa.string()).combine_chunks() for name in ("task", "sample_id")]
    return pc.binary_join_element_wise(*columns, "\x1f")


def labels_by_image(parts: Parts) -> tuple[pa.Array, Floats]:
    """All labelled images of the shards: their identities, and their local class as float."""
    tables = [
        read_table(unit.path / "samples.parquet", ("task", "sample_id", "label")) for unit in parts.units("shard")
    ]
    if not tables:
        return pa.array([], pa.string()), np.zeros(0)
    table = pa.concat_tables(tables)
    table = table.filter(pc.is_valid(table.column("label")))
    return image_keys(table), numbers_of(table, "label")


def read_predictions(parts: Parts, unseen: Sequence[str] = ()) -> dict[str, Predictions]:
    """{protocol: {model: outcomes}} of every model with labelled predictions, tasks that are `unseen` left out."""
    found: dict[str, Predictions] = {}
    for protocol, suffix in SUFFIXES.items():
        models = {}
        for unit in parts.units("evaluate"):
            path = unit.file("predictions.parquet")
            if path.is_file():
                outcomes = _outcomes(path, suffix, unseen)
                if len(outcomes.image):
                    models[unit.unit] = outcomes
        found[protocol] = models
    return found


def _outcomes(path: Path, suffix: str, unseen: Sequence[str]) -> Outcomes:
    answer = [f"{name}{suffix}" for name in ("label", "prediction", "confidence")]
    table = read_table(path, ("sample_id", "task", "level", *answer))
    if unseen:
        table = table.filter(pc.invert(pc.is_in(table.column("task"), pa.array(unseen))))
    label, prediction, confidence = (numbers_of(table, name) for name in answer)
    known = label >= 0
    return Outcomes(
        image=np.asarray(image_keys(table).to_pylist(), dtype=object)[known],
        level=np.asarray(table.column("level").to_pylist(), dtype=object)[known],
        confidence=confidence[known],
        correct=(prediction == label).astype(np.float64)[known],
    )


@dataclass(frozen=True)
class Paired:
    """Mean over tasks of (left − right) accuracy on the same images, and its standard error, as shares."""

    difference: float
    standard_error: float
    n: int


def paired_difference(predictions: Predictions, left: str, right: str) -> Paired | None:
    """Paired comparison over the corrupted levels; None when either has no predictions or they share no image.

    Levels of one image are averaged first: they are not independent draws. The variance is over images within tasks.
    """
    if left not in predictions or right not in predictions:
        return None
    a, b = _mean_by_image(predictions[left]), _mean_by_image(predictions[right])
    by_task: dict[str, list[float]] = {}
    for image in sorted(a.keys() & b.keys()):
        by_task.setdefault(image.split("\x1f", 1)[0], []).append(a[image] - b[image])
    groups = [np.asarray(values) for values in by_task.values() if len(values) > 1]
    if not groups:
        return None
    variance = sum(float(group.var(ddof=1)) / len(group) for group in groups) / len(groups) ** 2
    mean = float(np.mean([group.mean() for group in groups]))
    return Paired(mean, variance**0.5, sum(len(group) for group in groups))


def risk_coverage(outcomes: Outcomes, level: str, points: int = 200) -> tuple[Floats, Floats] | None:
    """(coverage, error rate among the most confident share) at one level, both in [0, 1]; None without images."""
    here = outcomes.level == level
    if not here.any():
        return None
    order = np.argsort(-outcomes.confidence[here], kind="stable")
    errors = 1.0 - outcomes.correct[here][order]
    risk = np.cumsum(errors) / np.arange(1, len(errors) + 1)
    coverage = np.arange(1, len(errors) + 1) / len(errors)
    keep = np.unique(np.linspace(0, len(errors) - 1, points).astype(int))
    return coverage[keep], risk[keep]


def _mean_by_image(outcomes: Outcomes) -> dict[str, float]:
    sums: dict[str, tuple[float, int]] = {}
    for image, level, correct in zip(outcomes.image, outcomes.level, outcomes.correct, strict=True):
        if level != CLEAN:
            total, count = sums.get(image, (0.0, 0))
            sums[image] = (total + float(correct), count + 1)
    return {image: total / count for image, (total, count) in sums.items()}
