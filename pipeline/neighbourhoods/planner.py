"""Which back end makes the edges, and what that will take. Pure: numbers in, a plan in words and numbers out.

The choice changes bytes, so it depends on the configuration and the pool alone: how many rows, how wide, and a rate of
arithmetic that is configured and not measured. What is measured, on the machine at hand, only makes the estimate.
"""

from dataclasses import dataclass
from math import ceil, log2, sqrt
from typing import Literal

from pipeline.errors import ConfigError

Backend = Literal["exact", "flat", "ivf", "gpu"]

# IVF: 3 sqrt(n) lists, as a power of two, so that a pool that grows keeps its quantiser until it has grown fourfold.
LISTS_PER_ROOT = 3
FEWEST_LISTS, MOST_LISTS, FEWEST_IN_A_LIST = 4, 2**16, 16
# Measured on two cores at D = 512: scanning a list is bound by memory where a product of matrices is not.
SCAN_COST = 6.0
FEWEST_IVF_ROWS = 4096
FLOAT, INT32, INT64 = 4, 4, 8
EDGE_BYTES = INT32 + FLOAT  # in a file of `edges`; `neighbours` has int64 rows
EDGE_WORK_BYTES = 64  # an edge while it is sorted: its ends, its cosine, an order and a copy
BLOCK_ROWS, BLOCK_COLUMNS = 2048, 4096
BLOCK_WORK_BYTES = 16 * FLOAT  # a cosine of a block, its mask and what is found in it


@dataclass(frozen=True)
class Choice:
    """A back end, its lists (0 without IVF), and why it was chosen."""

    backend: Backend
    n_lists: int
    reason: str


@dataclass(frozen=True)
class Expected:
    """What the build will take: seconds of one worker, bytes of memory a unit, of disk, directed edges."""

    seconds: float
    memory_bytes: float
    disk_bytes: float
    edges: float
    units: int


def exact_flops(n_rows: float, width: int) -> float:
    """Operations of the exact graph: every pair once, a product and a sum for each of D numbers."""
    return float(n_rows) ** 2 * width


def ivf_flops(n_rows: float, width: int, n_lists: int, n_probes: int) -> float:
    """Operations of IVF, as many as a product of matrices would do in that time: nearest lists, then their scan."""
    return 2 * n_rows * width * (n_lists + SCAN_COST * n_rows * min(n_probes, n_lists) / n_lists)


def lists_for(n_rows: int) -> int:
    """How many lists a pool of this size is cut into."""
    wanted = 1 << ceil(log2(LISTS_PER_ROOT * sqrt(n_rows)))
    return max(FEWEST_LISTS, min(MOST_LISTS, wanted, 1 << (n_rows // FEWEST_IN_A_LIST).bit_length()))


def choose(
    n_rows: int,
    width: int,
    *,
    wanted: Backend | Literal["auto"] = "auto",
    expected_rows: int | None = None,
    max_exact_s: float,
    gflops: float,
) -> Choice:
    """The back end for a pool: exact as long as that takes at most `max_exact_s` at `gflops`, else IVF.

    `expected_rows` stands for what the pool will grow to, so that the choice is made once. Equal input, equal choice.
    """
    rows = max(n_rows, expected_rows or 0)
    seconds = exact_flops(rows, width) / (gflops * 1e9)
    told = f"{rows:,} x {width} exactly: {duration(seconds)} at {gflops:g} GFLOP/s"
    if wanted == "auto":
        small = seconds <= max_exact_s or rows < FEWEST_IVF_ROWS
        backend: Backend = "exact" if small else "ivf"
        reason = f"{told}, {'within' if small else 'beyond'} index.max_exact_s {max_exact_s:g}"
    else:
        backend, reason = wanted, f"index.backend; {told}"
    return Choice(backend, lists_for(rows) if backend == "ivf" else 0, reason)


def expect(
    choice: Choice,
    *,
    n_rows: int,
    width: int,
    degree: float,
    n_probes: int,
    largest_part: int,
    flops_per_s: float,
    share: float = 1.0,
    units: int = 1,
) -> Expected:
    """What a share of the joins takes, at a mean degree that was seen on a sample."""
    flops = (
        ivf_flops(n_rows, width, choice.n_lists, n_probes)
        if choice.backend == "ivf"
        else exact_flops(n_rows, width) * (1 if choice.backend == "exact" else 2)
    )
    edges = degree * n_rows
    return Expected(
        seconds=share * flops / flops_per_s,
        memory_bytes=unit_bytes(choice, n_rows, width, degree, largest_part),
        disk_bytes=edges * (EDGE_BYTES + INT64 + FLOAT),
        edges=edges,
        units=units,
    )


def unit_bytes(choice: Choice, n_rows: int, width: int, degree: float, part_rows: int) -> float:
    """The most that one join of two partitions holds: both features, a block of cosines or two indexes, its edges."""
    features = 2 * part_rows * width * FLOAT
    edges = 2 * part_rows * degree * min(1.0, part_rows / n_rows) * EDGE_WORK_BYTES
    if choice.backend == "ivf":
        return 2 * features + choice.n_lists * width * FLOAT * 2 + edges
    block = min(BLOCK_ROWS, part_rows) * min(BLOCK_COLUMNS, part_rows) * BLOCK_WORK_BYTES
    return features * (2 if choice.backend == "flat" else 1) + block + edges


def check_fits(
    expected: Expected,
    choice: Choice,
    rows: int,
    width: int,
    degree: float,
    n_rows: int,
    *,
    memory_gib: float,
    free_bytes: float,
) -> None:
    """Nothing; `ConfigError` when a unit or the edges cannot fit, with the number that would."""
    budget = memory_gib * 2**30
    if expected.memory_bytes > budget:
        fitting = rows
        while fitting > 1 and unit_bytes(choice, n_rows, width, degree, fitting) > budget:
            fitting //= 2
        enough = ceil(10 * expected.memory_bytes / 2**30) / 10
        least = unit_bytes(choice, n_rows, width, degree, fitting)
        way = f"set index.rows_per_partition to {fitting}, or " if least <= budget else ""
        raise ConfigError(
            f"index.memory_gib: a join of two partitions of {rows:,} x {width} at mean degree {degree:.0f} needs "
            f"{enough:g} GiB, the budget is {memory_gib:g}; {way}raise index.memory_gib to {enough:g}"
        )
    if expected.disk_bytes > free_bytes:
        bearable = degree * free_bytes / expected.disk_bytes
        raise ConfigError(
            f"{expected.edges:,.0f} edges need {expected.disk_bytes / 2**30:.1f} GiB on disk, {free_bytes / 2**30:.1f} "
            f"are free: the mean degree would be {degree:.0f}, {bearable:.0f} would fit; raise index.min_cosine "
            "(or lower index.target_degree), or make room"
        )


def duration(seconds: float) -> str:
    """Seconds in the unit a reader would use."""
    for size, name in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.3g} s"
