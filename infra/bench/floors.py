"""What this machine can do at best, measured beside what is compared with it: products, copies; and peak memory."""

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from ctypes import CDLL
from pathlib import Path
from types import TracebackType

import torch

from bd_core.huge_pages import empty

RESULTS = Path(__file__).parent / "results"
SAMPLE_EVERY_S = 0.01


def seconds(run: Callable[[], object], device: torch.device | None = None) -> float:
    """Wall seconds of one call, a GPU's work included."""
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def matmul_flops_per_s(width: int, device: torch.device, dtype: torch.dtype = torch.float32, tries: int = 3) -> float:
    """The best rate of torch's own product of unit rows, at the size of a block of the radius graph."""
    rows = 2048 if device.type == "cpu" else 16384
    left = torch.randn(rows, width, device=device, dtype=dtype)
    right = torch.randn(2 * rows, width, device=device, dtype=dtype)
    room = torch.empty(rows, 2 * rows, device=device, dtype=dtype)
    best = min(seconds(lambda: torch.mm(left, right.T, out=room), device) for _ in range(tries + 1))
    return 2 * rows * 2 * rows * width / best


def copy_bytes_per_s(device: torch.device, tries: int = 5) -> float:
    """The best rate of a copy far larger than the caches, bytes read and written both counted; huge pages on a CPU."""
    source, target = (empty((2**26,), torch.float32, device).fill_(1) for _ in range(2))
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(tries + 1))
    return 2 * source.numel() * source.element_size() / best


class PeakMemory:
    """Bytes that this process held at most, above what it held at the start of the block."""

    def __enter__(self) -> "PeakMemory":
        CDLL(None).malloc_trim(0)  # what earlier work freed would hide what this one takes
        self._base = self._most = _resident()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._watcher.join()

    @property
    def bytes(self) -> int:
        """The peak so far."""
        return self._most - self._base

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_EVERY_S):
            self._most = max(self._most, _resident())


def spread(values: list[float], digits: int = 2) -> str:
    """The median, and the least and most where there are several."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def machine(device: torch.device) -> str:
    """The hardware and torch in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def slug(device: torch.device) -> str:
    """The hardware in the name of a results file."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return f"{platform.machine()}-{torch.get_num_threads()}cores"


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
