"""Stages that write down what happens to them, and that can be told to fail or to lose their process in the middle.

A file `lose-<unit>` in `events` kills the worker of that unit once, `fail-<unit>` makes it raise every time.
"""

import os
import signal
import time
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.config import Resources, Spec
from pipeline.errors import DataError
from pipeline.executors import Planned
from pipeline.formats.checkpoints import write_safetensors
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.training.context import TrainingContext
from pipeline.training.fit_stage import FitStage
from pipeline.training.history import write_history
from pipeline.training.loop import optimise

STEPS, CHECKPOINT_EVERY, TROUBLE_AT = 12, 4, 9


class CountSpec(Spec):
    count: int = 6


class Count(Stage):
    """Each unit writes its number; every call of `setup` and `process` is an event."""

    name: ClassVar[str] = "count"
    version: ClassVar[int] = 1
    spec: CountSpec

    def __init__(self, spec: CountSpec, events: Path, resources: Resources | None = None) -> None:
        super().__init__(spec, resources, seed=0)
        self.events = events

    def units(self, inputs: Inputs) -> list[Unit]:
        return [Unit(f"n-{number}", settings={"number": number}) for number in range(self.spec.count)]

    def setup(self, unit: Unit) -> None:
        note(self.events, f"setup {self.name}")

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        note(self.events, f"process {unit.id}")
        (out_dir / "number.txt").write_text(f"{unit.settings['number']}\n{torch.rand(3).tolist()}")
        trouble(self.events, unit.id)
        time.sleep(0.1)
        return StageReport(rows_in=1, rows_out=1)


class Recount(Count):
    """The same units as another stage."""

    name: ClassVar[str] = "recount"


class Meet(Count):
    """Waits until a unit of `MeetToo` runs as well."""

    name: ClassVar[str] = "meet"
    other: ClassVar[str] = "meet_too"

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        note(self.events, f"process {self.name}")
        deadline = time.monotonic() + 60
        while not any(event == f"process {self.other}" for _, event in seen(self.events)):
            assert time.monotonic() < deadline, f"{self.name} runs alone"
            time.sleep(0.05)
        (out_dir / "number.txt").write_text(str(unit.settings["number"]))
        return StageReport(rows_in=1, rows_out=1)


class MeetToo(Meet):
    """Waits until a unit of `Meet` runs as well."""

    name: ClassVar[str] = "meet_too"
    other: ClassVar[str] = "meet"


class LineSpec(Spec):
    workers: int = 1


class FitLine(FitStage):
    """Fits a small network; every step is an event. Trouble comes at step 9, two checkpoints after the start."""

    name: ClassVar[str] = "fit_line"
    version: ClassVar[int] = 1
    spec: LineSpec

    def __init__(self, spec: LineSpec, events: Path, resources: Resources | None = None) -> None:
        super().__init__(spec, resources, seed=3)
        self.events = events

    def units(self, inputs: Inputs) -> list[Unit]:
        return [Unit("line")]

    def fit(self, unit: Unit, out_dir: Path, context: TrainingContext) -> StageReport:
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        steps = iter(range(10**6))

        def step_loss(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
            x = torch.randn(32, 8, generator=generator)
            loss = (model(x)[:, 0] - x.sum(-1)).square().mean()
            note(self.events, f"step of rank {context.ranks[0]}")
            if next(steps) == TROUBLE_AT and context.ranks[-1] == self.workers - 1:
                trouble(self.events, unit.id)
            return loss, {}

        history = optimise(
            model,
            step_loss,
            steps=STEPS,
            learning_rate=0.01,
            seed=self.seed or 0,
            context=context,
            checkpoint_every=CHECKPOINT_EVERY,
        )
        write_safetensors(out_dir / "model.safetensors", model.state_dict())
        write_history(out_dir / "history.parquet", history)
        return StageReport(rows_in=1, rows_out=1)


def planned(stage: Stage) -> list[Planned]:
    """All units of a stage that needs no inputs."""
    return [Planned(unit, stage.key(unit)) for unit in stage.units({})]


def trouble(events: Path, unit: str) -> None:
    """Raise, or lose this process the first time, when told to."""
    if (events / f"fail-{unit}").exists():
        raise DataError(f"{unit} is in trouble; remove fail-{unit}")
    if (events / f"lose-{unit}").exists():
        (events / f"lose-{unit}").unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def note(events: Path, what: str) -> None:
    """One event; appended in one write, so that processes do not mix their lines."""
    with (events / "events.log").open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {what}\n")


def seen(events: Path) -> list[tuple[int, str]]:
    """(process id, event) of every event so far."""
    path = events / "events.log"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(int(line.partition(" ")[0]), line.partition(" ")[2]) for line in lines]
