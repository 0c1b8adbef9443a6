"""threshold: epsilon, the quantile of the ADS over the edges of all shards."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from bd_core.discrepancy import positive_quantile
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
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("score",)
    what: ClassVar[str] = "fix the threshold between positives and negatives"
    spec: ThresholdSpec

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit: epsilon."""
        return [Unit("epsilon", inputs=tuple(inputs["score"]))]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write `epsilon.json`."""
        ads_E = torch.from_numpy(np.concatenate([read_vectors(part.file("ads.npy")) for part in unit.inputs]))
        if not len(ads_E):
            raise ConfigError(
                "no image of the pool has a neighbour, so there is no pair to learn from; lower index.min_cosine or "
                "leave it out"
            )
        chosen = self.spec.epsilon
        epsilon = positive_quantile(ads_E, self.spec.positive_quantile) if chosen is None else chosen
        positive = (ads_E < epsilon).double().mean().item()
        found = {
            "epsilon": epsilon,
            "positive_quantile": self.spec.positive_quantile,
            "edges": len(ads_E),
            "positive_share": positive,
        }
        (out_dir / "epsilon.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return StageReport(
            rows_in=len(ads_E), rows_out=len(ads_E), metrics={"epsilon": epsilon, "positive_share": positive}
        )
