"""Stages that fit: the same `fit`, run in this process or by every worker of a Ray Train job."""

from abc import abstractmethod
from pathlib import Path

from pipeline.stage import Stage, StageReport, Unit
from pipeline.store import Store
from pipeline.training.context import LocalContext, TrainingContext


class FitStage(Stage):
    """A stage whose units are fits. `workers` splits every batch, so it changes bytes and belongs to the spec."""

    @property
    def workers(self) -> int:
        """How many data-parallel workers fit together."""
        return int(getattr(self.spec, "workers", 1))

    @abstractmethod
    def fit(self, unit: Unit, out_dir: Path, context: TrainingContext) -> StageReport:
        """Fit one unit; the worker of rank 0 writes the result below `out_dir`."""

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Fit one unit in this process."""
        return self.fit(unit, out_dir, LocalContext(Store.state_beside(out_dir), self.workers))
