"""The stage contract: what a stage is, what a unit of work is, what it reports.

A stage knows nothing of Ray, retries or the tracker. It says which units there are (`units`, on the driver, cheap),
loads what they share (`setup`, on the worker, once) and does one of them (`process`, writing only below `out_dir`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, time
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.config import Resources, Spec
from pipeline.store import Artefact, unit_key

if TYPE_CHECKING:
    import torch

Inputs = Mapping[str, Sequence[Artefact]]

MAX_SPANS = 4096


@dataclass(frozen=True)
class Unit:
    """A named piece of work. `settings` tells it from its siblings and is hashed; `payload` is not.

    A payload may hold only what `settings` and `inputs` already pin, such as the list of files whose digest is a
    setting, or what must not count, such as timings for the report.
    """

    id: str
    inputs: tuple[Artefact, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    payload: Any = None

    def of(self, stage: str) -> list[Artefact]:
        """Those of the unit's inputs that came from `stage`, in order."""
        return [artefact for artefact in self.inputs if artefact.stage == stage]

    def one(self, stage: str, unit: str | None = None) -> Artefact:
        """The only input from `stage` (or the one named `unit`)."""
        found = [artefact for artefact in self.of(stage) if unit in (None, artefact.unit)]
        assert len(found) == 1, f"unit {self.id} has {len(found)} inputs from {stage} {unit or ''}, one is needed"
        return found[0]


@dataclass
class StageReport:
    """What one unit says of its work. `rows_in == rows_out + rejected` is checked for every unit.

    `seconds` sums the time by kind of work; `spans` says when: [kind, began, ended], in seconds of the clock.
    """

    rows_in: int
    rows_out: int
    rejected: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    spans: list[list[Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count the time of the block as `name`."""
        began, start = time(), perf_counter()
        try:
            yield
        finally:
            self.took(name, began, perf_counter() - start)

    def took(self, name: str, began: float, seconds: float) -> None:
        """Count these seconds as `name`. Of very many spans the last one grows: the sums stay right."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        full = len(self.spans) >= MAX_SPANS
        if full and (same := next((span for span in reversed(self.spans) if span[0] == name), None)):
            same[2] += seconds
        else:
            self.spans.append([name, began, began + seconds])


class Stage(ABC):
    """One step of the flow. `version` is raised by hand when equal inputs must give other bytes."""

    name: ClassVar[str]
    version: ClassVar[int]
    needs: ClassVar[tuple[str, ...]] = ()
    what: ClassVar[str] = ""

    def __init__(self, spec: Spec, resources: Resources | None = None, seed: int | None = None) -> None:
        self.spec = spec
        self.resources = resources or Resources()
        self.seed = seed

    def check(self) -> None:  # noqa: B027 - most stages depend on nothing outside the store
        """Whatever can be found wrong before any work begins; `ConfigError` or `DataError` when it is."""

    @abstractmethod
    def units(self, inputs: Inputs) -> list[Unit]:
        """The units of this stage, in order. On the driver: cheap, checks its inputs, `ConfigError` when they fail."""

    def expect(self, units: Sequence[Unit]) -> dict[str, Any]:
        """What these units, all still to do, will take, where the stage itself can tell: facts for log and plan.

        On the driver, before the first of them begins. `ConfigError` when they cannot fit.
        """
        return {}

    def setup(self, unit: Unit) -> None:  # noqa: B027 - most stages have nothing to load
        """Load what all units share, once a worker; `unit` is the first one the worker was given."""

    @abstractmethod
    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Do one unit, on a worker; write only below `out_dir`."""

    @property
    def device(self) -> "torch.device":
        """CUDA when the stage was given a GPU and one is there, the CPU otherwise."""
        import torch

        return torch.device("cuda" if self.resources.gpus and torch.cuda.is_available() else "cpu")

    def hashed_spec(self) -> dict[str, Any]:
        """The part of the spec that counts in the key."""
        return self.spec.model_dump(mode="json")

    def key(self, unit: Unit) -> str:
        """The key of `unit`."""
        return unit_key(
            stage=self.name,
            version=self.version,
            spec=self.hashed_spec(),
            settings=dict(unit.settings),
            inputs=[(f"{a.stage}/{a.unit}", a.digest) for a in unit.inputs],
            seed=self.seed,
        )
