"""Every unit in this process, one after the other: for tests, debugging and the smallest machines."""

from collections import deque
from collections.abc import Sequence
from typing import Literal

from pipeline.config import Spec
from pipeline.executors.unit import Outcome, Planned, UnitRunner
from pipeline.stage import Stage
from pipeline.store import Store


class SerialSpec(Spec):
    """Every unit in this process, one after the other."""

    kind: Literal["serial"] = "serial"


class SerialExecutor:
    """Runs units in the calling process, in the order in which they were taken on."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._runner = UnitRunner(store, run_id)
        self._waiting: deque[tuple[Stage, Planned, str]] = deque()

    def start(self, stage: Stage, planned: Sequence[Planned]) -> None:
        """Take on every unit of `planned`."""
        token = f"{stage.name}-{planned[0].key}"
        self._waiting.extend((stage, each, token) for each in planned)

    def wait(self) -> tuple[str, Outcome]:
        """Do the next unit."""
        stage, planned, token = self._waiting.popleft()
        return stage.name, self._runner(stage, planned, token)

    def drop(self) -> list[str]:
        """Give up every unit that waits."""
        dropped = [stage.name for stage, _, _ in self._waiting]
        self._waiting.clear()
        return dropped

    def close(self) -> None:
        """Nothing was started, so nothing is released."""
