"""Time and peak memory of a command with all its descendants, Ray's own processes included."""

import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_EVERY_S = 2.0  # reading a large process costs milliseconds, and the run shares these cores


@dataclass(frozen=True)
class Measured:
    """Wall seconds, peak proportional set size in bytes (shared pages counted once), exit code, and what it printed."""

    wall_s: float
    peak_bytes: int
    returncode: int
    output: str


def measure(command: Sequence[str]) -> Measured:
    """Run `command` and watch its process tree until it ends."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = [0]
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, ended))
    watcher.start()
    output, _ = process.communicate()
    wall_s = time.perf_counter() - began
    ended.set()
    watcher.join()
    return Measured(wall_s, peak[0], process.returncode, output)


def _watch(root: int, peak: list[int], ended: threading.Event) -> None:
    seen = {root}
    while not ended.wait(SAMPLE_EVERY_S):
        seen = _tree(seen)
        peak[0] = max(peak[0], sum(_pss(pid) for pid in seen))


def _tree(seen: set[int]) -> set[int]:
    """The processes of `seen` that still live and all their descendants; daemons stay in it once they were seen."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    alive = {pid for pid in seen if pid in parents}
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in alive} - alive
        alive |= more
        grown = bool(more)
    return alive


def _pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
