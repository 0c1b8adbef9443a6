"""The compiled CPU kernel of radius graphs and ADS, where the installation built one.

`graph_kernel.cpp` is built with the package if a C++ compiler is there; without it, or for other dtypes and devices,
`radius_scan.py` and `edge_distance.py` do the same with torch. Shapes: Q queries, M base rows, D width, H hits, E
edges, A anchors, N rows of alpha, C classes.
"""

from __future__ import annotations

from ctypes import CDLL, c_double, c_int64, c_void_p
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

__all__ = ["graph_kernel_name", "kernel_distance", "kernel_place", "kernel_runs", "kernel_scan"]

# By what torch itself found the processor to have, best first.
BUILDS = {"AVX2": ("avx2",), "AVX512": ("avx512", "avx2")}


def graph_kernel_name() -> str:
    """Which build runs here: "avx512", "avx2", or "torch" for none."""
    return _library()[0]


def kernel_runs(*tensors: Tensor) -> bool:
    """Whether the kernel can read these: CPU, float32, contiguous, and a build is there."""
    fit = all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    return fit and _library()[1] is not None


def kernel_scan(
    query_QD: Float32[Tensor, "Q D"],
    base_MD: Float32[Tensor, "M D"],
    radius_Q: Float32[Tensor, " Q"],
    base_radius_M: Float32[Tensor, " M"] | None,
    own_Q: Int64[Tensor, " Q"] | None,
    first_query: int,
    first_base: int,
    block: int,
    band: float,
) -> tuple[list[int], Int32[Tensor, " H"], Int32[Tensor, " H"], Float32[Tensor, " H"]]:
    """Counts, query rows, base rows and cosines: hits from the queries, then those to them from each block of the base.

    Either own_Q has each query's own base row (-1: none), or first_query >= 0 is the base row of query 0 and only base
    rows above a query's own count. Base rows of a query come rising, and so do queries of a base row in a block.
    """
    library = _library()[1]
    assert library is not None and block > 0 and len(base_MD) < 2**31
    counts = torch.empty(1 - (first_base - len(base_MD)) // block, dtype=torch.int64)
    tensors = (query_QD, base_MD, radius_Q.contiguous(), base_radius_M, own_Q, counts)
    found = library.bd_scan(
        *(None if t is None else t.data_ptr() for t in tensors),
        *(len(query_QD), first_base, len(base_MD), query_QD.shape[1], first_query, block, torch.get_num_threads()),
        band,
    )
    total = int(counts.sum())
    row, column = torch.empty(total, dtype=torch.int32), torch.empty(total, dtype=torch.int32)
    cosine = torch.empty(total)
    library.bd_take(found, row.data_ptr(), column.data_ptr(), cosine.data_ptr())
    return counts.tolist(), row, column, cosine


def kernel_place(
    row: Int32[Tensor, " H"],
    column: Int32[Tensor, " H"],
    cosine: Float32[Tensor, " H"],
    shift: int,
    place: Int64[Tensor, " rows"],
    neighbours: Int64[Tensor, " E"],
    placed: Float32[Tensor, " E"],
) -> None:
    """Put column + shift and cosine where `place` says each row's next edge goes, and move `place` on."""
    library = _library()[1]
    assert library is not None
    library.bd_place(
        *(t.data_ptr() for t in (row, column, cosine)),
        *(len(row), shift),
        *(t.data_ptr() for t in (place, neighbours, placed)),
    )


def kernel_distance(
    anchor_AC: Float[Tensor, "A C"],
    base_NC: Float[Tensor, "N C"],
    anchor_scale_A: Float[Tensor, " A"],
    base_scale_N: Float[Tensor, " N"],
    offsets: Int64[Tensor, " boundaries"],
    neighbours: Int64[Tensor, " edges"],
    out_E: Float[Tensor, " E"],
) -> None:
    """Write sum_c |anchor_ic scale_i - base_jc scale_j| of the edges offsets[0] to offsets[-1] of these anchors."""
    library = _library()[1]
    assert library is not None
    tensors = (anchor_AC, base_NC, anchor_scale_A, base_scale_N, offsets, neighbours, out_E)
    library.bd_distance(*(t.data_ptr() for t in tensors), *anchor_AC.shape, torch.get_num_threads())


@cache
def _library() -> tuple[str, CDLL | None]:
    for build in BUILDS.get(torch.backends.cpu.get_cpu_capability(), ()):
        spec = find_spec(f"bd_core._graph_{build}")  # finds the file; it is no module that could be imported
        if spec is not None and spec.origin is not None:
            library = CDLL(spec.origin)
            library.bd_scan.argtypes = [c_void_p] * 6 + [c_int64] * 7 + [c_double]
            library.bd_scan.restype = c_void_p
            library.bd_take.argtypes = [c_void_p] * 4
            library.bd_take.restype = None
            library.bd_place.argtypes = [c_void_p] * 3 + [c_int64] * 2 + [c_void_p] * 3
            library.bd_place.restype = None
            library.bd_distance.argtypes = [c_void_p] * 7 + [c_int64] * 3
            library.bd_distance.restype = None
            return build, library
    return "torch", None
