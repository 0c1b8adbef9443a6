"""An interrupt that Python drops ends the run all the same, at the next unit."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_stages import Numbers, made_since, run_own
from tiny import Tiny

from pipeline import interrupts
from pipeline.stage import StageReport, Unit
from pipeline.store import Store


@pytest.fixture
def _listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(interrupts, "_asked", False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    interrupts.listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_listening")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_a_unit_swallowed_is_raised_after_it(
    tiny_project: Tiny, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    process = Numbers.process

    def swallowing(self: Numbers, unit: Unit, out_dir: Path) -> StageReport:
        if unit.id == "n-1":
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(number)
        return process(self, unit, out_dir)

    monkeypatch.setattr(Numbers, "process", swallowing)
    with pytest.raises(KeyboardInterrupt):
        run_own(tiny_project)
    assert made_since(Store(tiny_project.root / "store"), 0) == {"numbers/n-0", "numbers/n-1"}


@pytest.mark.usefixtures("_listening")
def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupts.listen()
    signal.raise_signal(signal.SIGINT)
    interrupts.check()


def test_without_a_signal_nothing_is_raised() -> None:
    interrupts.check()
