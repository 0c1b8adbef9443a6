"""What a method costs, as measured: seconds and memory of a merge or fit, and the price of one sample.

Clocks differ from run to run, so all of it goes into a unit's report and none of it into its files.
Shape letters: B batch, S input side.
"""

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from pipeline.costs import PEAK_MEMORY, WATCHED
from pipeline.stage import StageReport

RESET_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
SHORTEST_S, MOST_ROUNDS, FEWEST_ROUNDS = 0.3, 15, 3


@contextmanager
def watched(report: StageReport, kind: str) -> Iterator[None]:
    """Count the block's time as `kind`, and the most memory it held beyond what was there before it.

    The kernel's own high-water mark, set back first: no sampling, and what is inside torch counts too. Where there is
    no such mark (it is Linux's) the report has no figure.
    """
    assert kind in WATCHED, kind
    gc.collect()
    _give_back_freed()
    before = _resident_bytes("VmRSS") if _set_peak_back() else None
    try:
        with report.span(kind):
            yield
    finally:
        if before is not None:
            beyond = float(max(0, _resident_bytes("VmHWM") - before))
            report.metrics[PEAK_MEMORY] = max(beyond, report.metrics.get(PEAK_MEMORY, 0.0))


@torch.inference_mode()
def price_per_sample(run: Callable[[Tensor], object], plain: Callable[[Tensor], object], pixels_BSS3: Tensor) -> float:
    """Seconds of `run` by seconds of `plain` on the same images, in turns in this process: the median of the ratios."""
    ratios: list[float] = []
    run(pixels_BSS3)
    plain(pixels_BSS3)
    began = perf_counter()
    while len(ratios) < FEWEST_ROUNDS or (len(ratios) < MOST_ROUNDS and perf_counter() - began < SHORTEST_S):
        ratios.append(_seconds(run, pixels_BSS3) / _seconds(plain, pixels_BSS3))
    return median(ratios)


def _seconds(run: Callable[[Tensor], object], pixels_BSS3: Tensor) -> float:
    began = perf_counter()
    run(pixels_BSS3)
    if pixels_BSS3.is_cuda:
        torch.cuda.synchronize()
    return perf_counter() - began


def _set_peak_back() -> bool:
    """Whether the process's high-water mark now counts from here."""
    try:
        RESET_PEAK.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _resident_bytes(field: str) -> int:
    """`VmRSS`, what the process holds, or `VmHWM`, the most it has held."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _give_back_freed() -> None:
    """What earlier units freed is not the process's any more; kept, it would hide what the block takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # of the GNU C library alone
        trim(0)
