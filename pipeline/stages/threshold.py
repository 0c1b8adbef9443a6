"""threshold: epsilon, the quantile of the ADS over the edges of all shards."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bd_core.quantile import quantile_of_parts
from pipeline.config import Spec
from pipeline.errors import ConfigError
from pipeline.formats.vectors import read_vectors
from pipeline.stage import Inputs, Stage, StageReport, Unit


class ThresholdSpec(Spec):
    """epsilon, or the quantile it is taken from. The paper publishes neither; the default is ours."""

    epsilon: float | None = Field(default=None, description="overrides the quantile")
    positive_quantile: float = Field(default=0.5, gt=0, lt=1, description="share of edges that become positives")


class Threshold(Stage):
    """Fixes epsilon once for all shards."""

    name: ClassVar[str] = "threshold"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("score",)
    what: ClassVar[str] = "fix the threshold between positives and negatives"
    spec: ThresholdSpec

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit: epsilon."""
        return [Unit("epsilon", inputs=tuple(inputs["score"]))]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write `epsilon.json`."""
        n_edges = sum(len(read_vectors(part.file("ads.npy"), ndim=1)) for part in unit.inputs)
        if not n_edges:
            raise ConfigError(
                "no image of the pool has a neighbour, so there is no pair to learn from; lower index.min_cosine or "
                "leave it out"
            )
        chosen = self.spec.epsilon
        epsilon = quantile_of_parts(lambda: ads_of(unit), self.spec.positive_quantile) if chosen is None else chosen
        positive = sum(int((ads_E < epsilon).sum()) for ads_E in ads_of(unit)) / n_edges
        found = {
            "epsilon": epsilon,
            "positive_quantile": self.spec.positive_quantile,
            "edges": n_edges,
            "positive_share": positive,
        }
        (out_dir / "epsilon.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return StageReport(rows_in=n_edges, rows_out=n_edges, metrics={"epsilon": epsilon, "positive_share": positive})


def ads_of(unit: Unit) -> Iterator[Tensor]:
    """The discrepancies of one shard after the other; no more than one is in memory."""
    for part in unit.inputs:
        yield torch.from_numpy(np.array(read_vectors(part.file("ads.npy"), ndim=1)))
