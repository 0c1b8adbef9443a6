"""The least a merge can take on this machine: bytes at the copy rate, arithmetic at the rate of a matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["MATRIX", "Rates", "floor_seconds", "measured_rates"]

FLOAT = 4
# Readings of base and experts before the last entry can be written. Where something of a whole tensor or of the model
# must be known first, and a tensor fits in no cache, that is two.
READINGS = {"ties": 2, "pcb": 3, "model_stock": 2}
MATRIX = ("iso_c", "tsv_m", "wudi_exact", "ace")


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second."""

    copy_bytes_s: float
    flops_s: float


def measured_rates() -> Rates:
    """Best of several: bytes read plus written by a copy beyond all caches, operations of a float32 product."""
    source, side = torch.ones(2**26), torch.randn(1536, 1536)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source))
    multiplied = _best(lambda: side @ side)
    return Rates(2 * FLOAT * len(source) / copied, 2 * len(side) ** 3 / multiplied)


def floor_seconds(method: str, shapes: Mapping[str, tuple[int, ...]], n_experts: int, rates: Rates) -> float:
    """Bytes for entry-wise methods; for matrix methods bytes or arithmetic, whichever takes longer."""
    size = FLOAT * sum(torch.Size(shape).numel() for shape in shapes.values())
    moved = (READINGS.get(method, 1) * (n_experts + 1) + 1) * size / rates.copy_bytes_s
    if method not in MATRIX:
        return moved
    matrices = [shape for name, shape in shapes.items() if len(shape) == 2 and "embedding" not in name]
    return max(moved, sum(_flops(method, *shape, n_experts) for shape in matrices) / rates.flops_s)


def _flops(method: str, rows: int, columns: int, n_experts: int) -> float:
    """Multiply-adds count two. s and l are the short and the long side.

    A Gram matrix is symmetric, s^2 l; its eigenvectors take 4/3 s^3 to tridiagonal form and 2 s^2 for every one asked
    for; a product is 2 m n k; a symmetric system of order n is n^3 / 3 and 2 n^2 a right-hand side, a general one twice
    that.
    """
    s, l = sorted((rows, columns))  # noqa: E741
    eigen = s * s * l + 4 / 3 * s**3

    def vectors(count: float) -> float:
        return 2 * s * s * count + 2 * s * l * count  # of one side, and of the other through the matrix

    if method == "iso_c":
        return eigen + vectors(s)
    if method == "tsv_m":
        polar = 2 * (eigen + 2 * s**3 + 2 * s * s * l)
        return n_experts * (eigen + vectors(s / n_experts)) + polar + 2 * rows * columns * s
    per_expert = columns * columns * rows + 2 * rows * columns * s  # C_k, and tau_k C_k through the shorter side
    solve = columns**3 / 3 + 2 * rows * columns**2
    if method == "ace":
        return n_experts * per_expert + 2 * columns**3 / 3 + 2 * rows * columns**2
    return n_experts * per_expert + solve


def _best(run: Callable[[], object], times: int = 7) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)
