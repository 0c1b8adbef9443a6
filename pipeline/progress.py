"""Progress: one live line a stage on a terminal, plain lines otherwise."""

import sys
from time import perf_counter

from pipeline import logs

PLAIN_EVERY_S = 15.0


class Progress:
    """Shows where a stage stands; the last word on each stage is a log line."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._stage, self._total, self._done, self._reused = "", 0, 0, 0
        self._began = self._said = 0.0

    def begin(self, stage: str, what: str, total: int, reused: int) -> None:
        """A stage begins with `reused` of `total` units in the store."""
        self._stage, self._total, self._done, self._reused = stage, total, reused, reused
        self._began = self._said = perf_counter()
        if reused < total:
            self._show(what)

    def step(self, unit: str) -> None:
        """One unit ended."""
        self._done += 1
        if self._live or perf_counter() - self._said > PLAIN_EVERY_S:
            self._said = perf_counter()
            self._show(unit)

    def end(self, rows: int, rejected: int) -> None:
        """The stage ended."""
        if self._live:
            sys.stderr.write("\r\x1b[K")
        logs.fact(
            f"{self._stage:<10} done",
            units=self._total,
            reused=self._reused,
            rows=rows,
            rejected=rejected,
            seconds=round(perf_counter() - self._began, 1),
        )

    def _show(self, detail: str) -> None:
        if self._live:
            seconds = perf_counter() - self._began
            sys.stderr.write(f"\r\x1b[K{self._stage} {self._done}/{self._total} {seconds:.0f} s {detail[:60]}")
            sys.stderr.flush()
        else:
            logs.fact(f"{self._stage:<10} runs", done=f"{self._done}/{self._total}", at=detail.replace(" ", "-"))
