"""Every unit in this process, one after the other: for tests, debugging and the smallest machines."""

from collections.abc import Callable, Sequence
from typing import Literal

from pipeline.config import Spec
from pipeline.executors.unit import Outcome, Planned, UnitRunner
from pipeline.stage import Stage
from pipeline.store import Store


class SerialSpec(Spec):
    """Every unit in this process, one after the other."""

    kind: Literal["serial"] = "serial"


class SerialExecutor:
    """Runs units in order in the calling process."""

    parallelism = 1

    def __init__(self, store: Store, run_id: str) -> None:
        self._runner = UnitRunner(store, run_id)

    def run(self, stage: Stage, planned: Sequence[Planned], done: Callable[[Outcome], None]) -> None:
        """Do every unit of `planned`, calling `done` once for each."""
        token = f"{stage.name}-{planned[0].key}"
        for each in planned:
            done(self._runner(stage, each, token))

    def close(self) -> None:
        """Nothing was started, so nothing is released."""
