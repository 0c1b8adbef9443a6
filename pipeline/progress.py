"""Progress: one live line on a terminal, plain lines otherwise."""

import sys
from dataclasses import dataclass
from time import perf_counter

from pipeline import logs

PLAIN_EVERY_S = 15.0
ERASE = "\r\x1b[K"


@dataclass
class _Running:
    total: int
    reused: int
    done: int
    began: float
    said: float


class Progress:
    """Shows where the stages under way stand; the last word on each stage is a log line."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._stages: dict[str, _Running] = {}

    def begin(self, stage: str, what: str, total: int, reused: int) -> None:
        """A stage begins with `reused` of `total` units in the store."""
        now = perf_counter()
        self._stages[stage] = _Running(total, reused, reused, now, now)
        self._show(stage, what)

    def step(self, stage: str, unit: str) -> None:
        """One unit ended."""
        running = self._stages[stage]
        running.done += 1
        if self._live or perf_counter() - running.said > PLAIN_EVERY_S:
            running.said = perf_counter()
            self._show(stage, unit)

    def end(self, stage: str, rows: int, rejected: int) -> None:
        """The stage ended."""
        running = self._stages.pop(stage)
        if self._live:
            sys.stderr.write(ERASE)
        seconds = round(perf_counter() - running.began, 1)
        logs.fact(
            f"{stage:<10} done",
            units=running.total,
            reused=running.reused,
            rows=rows,
            rejected=rejected,
            seconds=seconds,
        )

    def _show(self, stage: str, detail: str) -> None:
        if self._live:
            now = perf_counter()
            each = (f"{name} {r.done}/{r.total} {now - r.began:.0f} s" for name, r in self._stages.items())
            sys.stderr.write(f"{ERASE}{', '.join(each)}; {detail[:60]}")
            sys.stderr.flush()
        else:
            running = self._stages[stage]
            at = detail.replace(" ", "-")
            logs.fact(f"{stage:<10} runs", done=f"{running.done}/{running.total}", at=at)
