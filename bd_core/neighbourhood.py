"""Which samples are near which: radius graphs over unit features, exact, made block by block.

Shapes: N samples (the queries, or anchors), M base rows, D width, E edges, A anchors.

Which pairs are edges depends on their two rows and the radius alone (see `radius_scan.py`), not on blocks, devices or
dtypes of the product, and an edge is found from both its ends. Its cosine is a float32 product, good to 1e-6; cosines
of equal or opposite vectors can come out as 1 or -1 give or take 1e-7, and are not clamped.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from bd_core.radius_choice import adaptive_min_cosine, calibrate_min_cosine
from bd_core.radius_scan import BLOCK_COLUMNS, Hits, check_query, exact_cosine, place_csr, rounding_bound, scan, spans

__all__ = [
    "Neighbourhoods",
    "adaptive_min_cosine",
    "calibrate_min_cosine",
    "exact_cosine",
    "radius_graph",
    "radius_graph_between",
    "radius_graph_parts",
    "rounding_bound",
]

Csr = tuple[Tensor, Tensor, Tensor]  # offsets, neighbours and cosines, not yet checked
CPU_ROWS, GPU_ROWS = 2048, 16384  # queries of a block
CHECKED_EDGES = 2**22  # edges whose order is checked at a time


@dataclass(frozen=True, eq=False)
class Neighbourhoods:
    """A_r(x_i) for every anchor i in CSR form: its edges are offsets[i] to offsets[i + 1], neighbours ascending.

    Neighbours are rows of the base; an anchor is never its own neighbour. An anchor without edges is isolated.
    Raises ValueError when the three tensors are no such graph.
    """

    offsets: Int64[Tensor, " boundaries"]  # [A + 1], from 0 to E, never falling
    neighbours: Int64[Tensor, " E"]
    cosine: Float32[Tensor, " E"]

    def __post_init__(self) -> None:
        offsets, neighbours = self.offsets, self.neighbours
        n_edges = neighbours.numel()
        if (
            offsets.ndim != 1
            or offsets.numel() < 2
            or offsets[0] != 0
            or offsets[-1] != n_edges
            or self.degree.min() < 0
        ):
            raise ValueError(
                f"Neighbourhoods: offsets {offsets} must be [A + 1 >= 2], start at 0, never fall and end at the number "
                f"of neighbours, {n_edges}; rebuild the graph with radius_graph"
            )
        if self.cosine.shape != neighbours.shape or not _all_finite(self.cosine):
            raise ValueError(
                f"Neighbourhoods: cosine has shape {tuple(self.cosine.shape)} or nan/inf for {n_edges} neighbours; "
                "give one finite cosine an edge"
            )
        if n_edges and (place := self._first_bad_neighbour()) is not None:
            anchor = int(torch.searchsorted(offsets, place, right=True)) - 1
            raise ValueError(
                f"Neighbourhoods: neighbours[{place}] = {int(neighbours[place])} of anchor {anchor} is "
                "negative or not above the one before it; sort each anchor's neighbours and drop duplicates"
            )

    def _first_bad_neighbour(self) -> int | None:
        """The first edge that is negative or not above the one before it of the same anchor; None if there is none."""
        if self.neighbours.min() < 0:
            return int(self.neighbours.argmin())
        for start in range(1, len(self.neighbours), CHECKED_EDGES):
            after = self.neighbours[start : start + CHECKED_EDGES]
            falling = after <= self.neighbours[start - 1 : start - 1 + len(after)]
            ends = torch.tensor([start, start + len(falling)], device=falling.device)
            first, last = torch.searchsorted(self.offsets, ends).tolist()
            falling[self.offsets[first:last] - start] = False  # where an anchor begins
            if falling.any():
                return start + int(falling.nonzero()[0])
        return None

    @cached_property
    def degree(self) -> Int64[Tensor, " A"]:
        """How many neighbours each anchor has."""
        return self.offsets.diff()

    def anchors(self) -> Int64[Tensor, " E"]:
        """The anchor of every edge, beside `neighbours`."""
        return torch.repeat_interleave(self.degree)

    @property
    def n_anchors(self) -> int:
        """How many anchors there are, isolated ones included."""
        return len(self.offsets) - 1

    @property
    def n_isolated(self) -> int:
        """How many anchors have no neighbour, and so no ADS."""
        return int((self.degree == 0).sum())

    @property
    def isolated_share(self) -> float:
        """n_isolated / n_anchors."""
        return self.n_isolated / self.n_anchors


def radius_graph(
    features_ND: Float[Tensor, "N D"],
    min_cosine: float | Float[Tensor, " N"],
    *,
    base_MD: Float[Tensor, "M D"] | None = None,
    self_rows: Int64[Tensor, " N"] | None = None,
    block_rows: int | None = None,
    product: torch.dtype = torch.float32,
) -> Neighbourhoods:
    """The neighbours of every query: all base rows with cosine >= min_cosine (inclusive, as float32), itself excluded.

    min_cosine is one number or one a query (see `adaptive_min_cosine`). Without a base, the queries are the base, and
    each pair is multiplied once for both its edges. With one, self_rows[i] is the row of the base that is query i
    itself, or -1; None says no query is in the base. A query's duplicates are neighbours like any other. `product` is
    the dtype of the matrix product; with bfloat16 it picks candidates for the same edges. Memory beside in- and
    output: the graph twice more, and block_rows x BLOCK_COLUMNS cosines where the compiled kernel does not run.

    Raises ValueError for empty, not finite or unnormalised features, shapes that do not fit, or min_cosine outside
    [-1, 1].
    """
    place = "radius_graph"
    return _whole(_csr_parts(place, features_ND, min_cosine, base_MD, self_rows, block_rows, product, mirror=True))


def radius_graph_parts(
    features_ND: Float[Tensor, "N D"],
    min_cosine: float | Float[Tensor, " N"],
    *,
    base_MD: Float[Tensor, "M D"] | None = None,
    self_rows: Int64[Tensor, " N"] | None = None,
    block_rows: int | None = None,
    product: torch.dtype = torch.float32,
    mirror: bool = True,
) -> Iterator[tuple[slice, Neighbourhoods]]:
    """`radius_graph` a block of queries at a time, in order: which queries, and their neighbours in the whole base.

    Without a base, edges that were found from the other end wait for their block: up to a quarter of the graph.
    mirror=False multiplies each pair twice and keeps nothing, for graphs too dense for that.
    """
    place = "radius_graph"
    parts = _csr_parts(place, features_ND, min_cosine, base_MD, self_rows, block_rows, product, mirror)
    return ((rows, Neighbourhoods(*part)) for rows, part in parts)


def radius_graph_between(
    features_ND: Float[Tensor, "N D"],
    other_MD: Float[Tensor, "M D"],
    min_cosine: float | Float[Tensor, " N"],
    other_min_cosine: float | Float[Tensor, " M"] | None = None,
    *,
    block_rows: int | None = None,
    product: torch.dtype = torch.float32,
) -> tuple[Neighbourhoods, Neighbourhoods]:
    """The edges from `features` into `other` and those from `other` into `features`, multiplied once for both.

    For two partitions of one pool that share no sample: with the graph of each partition itself, they make up the
    graph of the pool. other_min_cosine None takes min_cosine, which must then be one number. An edge has the same
    cosine whichever side it is found from.

    Raises ValueError as `radius_graph`.
    """
    place = "radius_graph_between"
    _, none_N = check_query(place, features_ND, other_MD, None, block_rows)
    radius_N = _radii(place, min_cosine, features_ND, "a row of features")
    radius_M = _radii(place, min_cosine if other_min_cosine is None else other_min_cosine, other_MD, "a row of other")
    features, other, size = features_ND.float(), other_MD.float(), _block_rows(features_ND, block_rows)
    found, back = [], []
    for rows in spans(len(features), size):
        there, here = scan(
            features[rows], other, radius_N[rows], own_Q=none_N[rows], base_radius_M=radius_M, product=product
        )
        found.append((rows, place_csr([there], rows.stop - rows.start, features.device)))
        for start, hits in zip(range(0, len(other), BLOCK_COLUMNS), here, strict=True):
            back.append(Hits(hits.row + start, hits.column, hits.cosine, rows.start))
    return _whole(found), Neighbourhoods(*place_csr(back, len(other), features.device))


def _csr_parts(
    place: str,
    features: Tensor,
    min_cosine: float | Tensor,
    base: Tensor | None,
    self_rows: Tensor | None,
    block_rows: int | None,
    product: torch.dtype,
    mirror: bool,
) -> Iterator[tuple[slice, Csr]]:
    """Blocks of queries and their edges, after checking that everything fits."""
    whole_base, own_N = check_query(place, features, base, self_rows, block_rows)
    radius_N = _radii(place, min_cosine, features, "a query")
    size = _block_rows(features, block_rows)
    if base is None and mirror:
        return _mirrored_parts(features.float(), radius_N, size, product)
    whole_base = whole_base.float()
    return _parts(whole_base if base is None else features.float(), whole_base, own_N, radius_N, size, product)


def _parts(
    features: Tensor, base: Tensor, own_N: Tensor, radius_N: Tensor, size: int, product: torch.dtype
) -> Iterator[tuple[slice, Csr]]:
    for rows in spans(len(features), size):
        hits, _ = scan(features[rows], base, radius_N[rows], own_Q=own_N[rows], product=product)
        yield rows, place_csr([hits], rows.stop - rows.start, features.device)


def _mirrored_parts(features: Tensor, radius_N: Tensor, size: int, product: torch.dtype) -> Iterator[tuple[slice, Csr]]:
    """Blocks on and above the diagonal; what they find for later blocks waits there, so that neighbours come rising."""
    blocks = list(spans(len(features), size))
    waiting: list[list[Hits]] = [[] for _ in blocks]
    for first, rows in enumerate(blocks):
        there, back = scan(
            features[rows],
            features,
            radius_N[rows],
            base_radius_M=radius_N,
            first_query=rows.start,
            block=size,
            product=product,
        )
        for to, hits in zip(waiting[first:], back, strict=True):
            to.append(Hits(hits.row, hits.column, hits.cosine, rows.start))
        parts = [*waiting[first], there]
        waiting[first] = []
        yield rows, place_csr(parts, rows.stop - rows.start, features.device)


def _whole(parts: Iterable[tuple[slice, Csr]]) -> Neighbourhoods:
    """The graph of all blocks."""
    degrees, neighbours, cosines = [], [], []
    for _, (offsets, neighbours_E, cosine_E) in parts:
        degrees.append(offsets.diff())
        neighbours.append(neighbours_E)
        cosines.append(cosine_E)
    degree = torch.cat(degrees)
    joined = torch.cat(neighbours)
    neighbours.clear()  # one copy of the graph at a time
    return Neighbourhoods(torch.cat([degree.new_zeros(1), degree.cumsum(0)]), joined, torch.cat(cosines))


def _all_finite(values: Tensor) -> bool:
    """Whether no value is nan or infinite, without a mask."""
    return len(values) == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(values))


def _radii(place: str, min_cosine: float | Tensor, features: Tensor, each: str) -> Tensor:
    """One float32 radius a row, after checking the number or numbers given."""
    radius = torch.as_tensor(min_cosine, dtype=torch.float32, device=features.device)
    if radius.shape not in ((), (len(features),)) or not ((radius >= -1) & (radius <= 1)).all():
        raise ValueError(
            f"{place}: min_cosine = {min_cosine}, needs one number in [-1, 1] or {len(features)}, one {each}; "
            "get one from calibrate_min_cosine or adaptive_min_cosine"
        )
    return radius.expand(len(features)).contiguous()


def _block_rows(features: Tensor, block_rows: int | None) -> int:
    return block_rows or (CPU_ROWS if features.device.type == "cpu" else GPU_ROWS)
