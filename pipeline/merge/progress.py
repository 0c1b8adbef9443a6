"""One live line on a terminal, a plain line every quarter of a minute otherwise."""

import sys
from time import perf_counter

from pipeline import logs
from pipeline.merge.spec import human
from pipeline.progress import ERASE, PLAIN_EVERY_S

LIVE_EVERY_S = 0.1


class MergeProgress:
    """Shows how many tensors are merged and written; `clear` takes the live line away."""

    def __init__(self, method: str, tensors: int) -> None:
        self._method, self._total = method, tensors
        self._live = sys.stderr.isatty()
        self._began = self._said = perf_counter()
        self._done = self._bytes = 0

    def step(self, name: str, size_bytes: int) -> None:
        """One tensor is done."""
        self._done += 1
        self._bytes += size_bytes
        self._show(name)

    def phase(self, what: str) -> None:
        """Something else than merging begins."""
        self._said = 0.0
        self._show(what)

    def clear(self) -> None:
        """End the live line."""
        if self._live:
            sys.stderr.write(ERASE)
            sys.stderr.flush()

    def _show(self, detail: str) -> None:
        now = perf_counter()
        if now - self._said < (LIVE_EVERY_S if self._live else PLAIN_EVERY_S):
            return
        if self._live:
            where = (
                f"{self._method} {self._done}/{self._total} tensors, {human(self._bytes)}, {now - self._began:.0f} s"
            )
            sys.stderr.write(f"{ERASE}{where}; {detail[:60]}")
            sys.stderr.flush()
        elif self._said:
            logs.fact("merge runs", done=f"{self._done}/{self._total}", written=human(self._bytes).replace(" ", ""))
        self._said = now
