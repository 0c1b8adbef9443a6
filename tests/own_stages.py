"""A small flow of our own, as anybody adding stages would write it: numbers, their squares, and the sum of these.

A file `fail-<unit>` in `Numbers.trouble` makes that unit fail, `lose-<unit>` makes it lose a row.
"""

import json
import time
from collections import deque
from pathlib import Path
from typing import ClassVar

from tiny import Tiny

from pipeline.config import Resources, Spec
from pipeline.errors import DataError
from pipeline.executors import Outcome, SerialExecutor
from pipeline.record import RunRecord
from pipeline.run import run
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.store import Store
from pipeline.workflow import Workflow

RESUME = "bd-merge run own.yaml seed=0"


class NumbersSpec(Spec):
    count: int = 4
    bytes: int = 100


class Numbers(Stage):
    name: ClassVar[str] = "numbers"
    version: ClassVar[int] = 1
    spec: NumbersSpec

    def __init__(
        self, spec: NumbersSpec, resources: Resources | None = None, seed: int | None = 0, *, trouble: Path
    ) -> None:
        super().__init__(spec, resources, seed)
        self.trouble = trouble

    def hashed_spec(self) -> dict[str, object]:
        return {"bytes": self.spec.bytes}

    def units(self, inputs: Inputs) -> list[Unit]:
        return [Unit(f"n-{number}", settings={"number": number}) for number in range(self.spec.count)]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        (out_dir / "number.json").write_text(json.dumps(unit.settings["number"]))
        (out_dir / "ballast").write_bytes(b"0" * self.spec.bytes)
        if (self.trouble / f"fail-{unit.id}").exists():
            raise DataError(f"{unit.id} is in trouble; remove fail-{unit.id}")
        lost = (self.trouble / f"lose-{unit.id}").exists()
        return StageReport(rows_in=3, rows_out=1 if lost else 2, rejected=1)


class SquareSpec(Spec):
    power: int = 2


class Squares(Stage):
    name: ClassVar[str] = "squares"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("numbers",)
    spec: SquareSpec

    def units(self, inputs: Inputs) -> list[Unit]:
        return [Unit(part.unit, inputs=(part,)) for part in inputs["numbers"]]

    def setup(self, unit: Unit) -> None:
        self.setups = getattr(self, "setups", 0) + 1

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        number = json.loads(unit.one("numbers").file("number.json").read_text())
        # Parity for an even power of -1: other specs can give equal bytes.
        (out_dir / "square.json").write_text(json.dumps(abs(number) ** self.spec.power))
        return StageReport(rows_in=2, rows_out=2)


class Total(Stage):
    name: ClassVar[str] = "total"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("squares",)

    def units(self, inputs: Inputs) -> list[Unit]:
        return [Unit("total", inputs=tuple(inputs["squares"]))]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        total = sum(json.loads(part.file("square.json").read_text()) for part in unit.inputs)
        (out_dir / "total.json").write_text(json.dumps(total))
        return StageReport(rows_in=len(unit.inputs), rows_out=len(unit.inputs))


class Letters(Stage):
    """Needs nothing, so it begins beside the numbers."""

    name: ClassVar[str] = "letters"
    version: ClassVar[int] = 1
    trouble: Path | None = None
    count: int = 1

    def units(self, inputs: Inputs) -> list[Unit]:
        return [Unit("letters"), *(Unit(f"more-{number}") for number in range(1, self.count))]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        if self.trouble is not None and (self.trouble / "fail-letters").exists():
            raise DataError("letters are in trouble")
        (out_dir / "letters.txt").write_text("abc")
        return StageReport(rows_in=3, rows_out=3)


class FailingFirst(SerialExecutor):
    """Does `letters` and `n-0` before all other units, so that two stages have failures when one of them ends."""

    def wait(self) -> tuple[str, Outcome]:
        first = ("letters", "n-0")
        self._waiting = deque(sorted(self._waiting, key=lambda each: each[1].unit.id not in first))
        return super().wait()


def own_workflow(
    tiny: Tiny,
    *,
    numbers: NumbersSpec | None = None,
    squares: SquareSpec | None = None,
    resources: Resources | None = None,
    seed: int = 0,
) -> Workflow:
    """A workflow of our stages in the project's store; the seed is that of `numbers`."""
    workflow = Workflow.load(tiny.write(seed=seed))
    workflow.stages = [
        Numbers(numbers or NumbersSpec(), resources, seed, trouble=tiny.root),
        Squares(squares or SquareSpec(), resources),
        Total(Spec(), resources),
    ]
    return workflow


def run_own(tiny: Tiny, **changes: object) -> RunRecord:
    return run(own_workflow(tiny, **changes), RESUME)  # type: ignore[arg-type]


def total_of(record: RunRecord, store: Store) -> int:
    total: int = json.loads(record.artefacts(store)["total"][0].file("total.json").read_text())
    return total


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """{path: (time of change, size)} of every file and directory below `root`, the lock left out."""
    return {
        path.relative_to(root).as_posix(): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(root.rglob("*"))
        if path.name != ".lock"
    }


def made_since(store: Store, began: float) -> set[str]:
    """`stage/unit` of every unit that was made after `began`."""
    return {f"{m.stage}/{m.unit}" for _, m in store.units() if m.made["began"] >= began}


def clock() -> float:
    """Now; the next unit is made later."""
    time.sleep(0.002)
    return time.time()
