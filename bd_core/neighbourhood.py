"""Which samples are near which: a radius graph over unit features, exact, made block by block.

Shapes: N samples (the queries, or anchors), M base rows, D width, E edges, A anchors.

Rounding: cosines are float32 products of float32 features and are compared as they come out, so they are good to about
1e-6. A pair that near the radius can fall on either side, and differently for other block sizes or devices; cosines of
equal or opposite vectors can come out as 1 or -1 give or take 1e-7, and are not clamped.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from bd_core.checks import check_features

BLOCK_COLUMNS = 16384
ROUNDING = 1e-6  # calibrated radii are lowered by it, so that the edges they were made for survive another block size


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
        if self.cosine.shape != neighbours.shape or not torch.isfinite(self.cosine).all():
            raise ValueError(
                f"Neighbourhoods: cosine has shape {tuple(self.cosine.shape)} or nan/inf for {n_edges} neighbours; "
                "give one finite cosine an edge"
            )
        anchor_E = self.anchors()
        falling = (neighbours.diff() <= 0) & (anchor_E.diff() == 0)
        if n_edges and (neighbours.min() < 0 or falling.any()):
            place = int(falling.nonzero()[0]) + 1 if falling.any() else int(neighbours.argmin())
            raise ValueError(
                f"Neighbourhoods: neighbours[{place}] = {int(neighbours[place])} of anchor {int(anchor_E[place])} is "
                "negative or not above the one before it; sort each anchor's neighbours and drop duplicates"
            )

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
    block_rows: int = 1024,
) -> Neighbourhoods:
    """The neighbours of every query: all base rows with cosine >= min_cosine (inclusive, as float32), itself excluded.

    min_cosine is one number or one a query (see `adaptive_min_cosine`). Without a base, the queries are the base. With
    one, self_rows[i] is the row of the base that is query i itself, or -1; None says no query is in the base. A
    query's duplicates are neighbours like any other. Memory beside in- and output: block_rows x BLOCK_COLUMNS cosines.

    Raises ValueError for empty, not finite or unnormalised features, shapes that do not fit, or min_cosine outside
    [-1, 1].
    """
    base_MD, self_rows = _check_query("radius_graph", features_ND, base_MD, self_rows, block_rows)
    n_queries = len(features_ND)
    threshold = torch.as_tensor(min_cosine, dtype=torch.float32, device=features_ND.device)
    if threshold.shape not in ((), (n_queries,)) or not ((threshold >= -1) & (threshold <= 1)).all():
        raise ValueError(
            f"radius_graph: min_cosine = {min_cosine}, needs one number in [-1, 1] or {n_queries}, one a query; "
            "get one from calibrate_min_cosine or adaptive_min_cosine"
        )
    threshold_N1 = threshold.expand(n_queries)[:, None]
    degree_N = torch.zeros(n_queries, dtype=torch.int64, device=features_ND.device)
    neighbours, cosines = [], []
    for rows in _spans(n_queries, block_rows):
        anchor_parts, neighbour_parts, cosine_parts = [], [], []
        for first_column, cosine in _cosine_blocks(features_ND, base_MD, self_rows, rows):
            anchor, column = (cosine >= threshold_N1[rows]).nonzero(as_tuple=True)
            anchor_parts.append(anchor)
            neighbour_parts.append(column + first_column)
            cosine_parts.append(cosine[anchor, column])
        anchor_E = torch.cat(anchor_parts)
        order_E = anchor_E.argsort(stable=True)  # column blocks came in order: a stable sort keeps neighbours ascending
        neighbours.append(torch.cat(neighbour_parts)[order_E])
        cosines.append(torch.cat(cosine_parts)[order_E])
        degree_N[rows] = torch.bincount(anchor_E, minlength=rows.stop - rows.start)
    offsets = torch.cat([degree_N.new_zeros(1), degree_N.cumsum(0)])
    return Neighbourhoods(offsets=offsets, neighbours=torch.cat(neighbours), cosine=torch.cat(cosines))


def calibrate_min_cosine(
    features_ND: Float[Tensor, "N D"],
    *,
    max_isolated: float,
    sample: int,
    generator: torch.Generator,
    block_rows: int = 1024,
) -> float:
    """The smallest global radius, as a cosine, under which at most a share max_isolated of the samples is isolated.

    Ours: the paper's radius is not published, and a mean degree is a bad guide where densities differ. The share is
    measured on `sample` rows drawn with the (CPU) generator, or on all if there are no more, against all rows.

    Raises ValueError for features as `radius_graph`, fewer than two rows, or max_isolated outside [0, 1).
    """
    if not 0 <= max_isolated < 1:
        raise ValueError(f"calibrate_min_cosine: max_isolated = {max_isolated}, needs a share in [0, 1); try 0.01")
    if sample < 1 or len(features_ND) < 2:
        raise ValueError(
            f"calibrate_min_cosine: sample = {sample} of {len(features_ND)} rows, needs at least 1 of 2; add samples"
        )
    drawn = torch.arange(len(features_ND))
    if sample < len(features_ND):
        drawn = torch.randperm(len(features_ND), generator=generator)[:sample]
    drawn = drawn.to(features_ND.device)
    nearest = _kth_cosine("calibrate_min_cosine", features_ND[drawn], 1, features_ND, drawn, block_rows)
    allowed = int(max_isolated * len(nearest))
    return nearest.sort().values[allowed].item()


def adaptive_min_cosine(
    features_ND: Float[Tensor, "N D"],
    target_degree: int,
    base_MD: Float[Tensor, "M D"] | None = None,
    *,
    self_rows: Int64[Tensor, " N"] | None = None,
    block_rows: int = 1024,
) -> Float32[Tensor, " N"]:
    """One radius a query, as a cosine, under which it has target_degree neighbours, or more where distances are equal.

    Ours: the cosine of the target_degree-th nearest other row, for `radius_graph` with the same base and self_rows.

    Raises ValueError for features as `radius_graph`, or when the base has fewer than target_degree other rows.
    """
    return _kth_cosine("adaptive_min_cosine", features_ND, target_degree, base_MD, self_rows, block_rows)


def _kth_cosine(
    place: str, features: Tensor, k: int, base: Tensor | None, self_rows: Tensor | None, block_rows: int
) -> Tensor:
    """The k-th largest cosine of every query to another base row, lowered by ROUNDING and kept in [-1, 1]."""
    base, self_rows = _check_query(place, features, base, self_rows, block_rows)
    others = len(base) - int((self_rows >= 0).any())
    if not 1 <= k <= others:
        raise ValueError(f"{place}: {k} neighbours asked for, {others} other rows in the base; choose 1 to {others}")
    kth = []
    for rows in _spans(len(features), block_rows):
        top = features.new_empty((rows.stop - rows.start, 0), dtype=torch.float32)
        for _, cosine in _cosine_blocks(features, base, self_rows, rows):
            top = torch.cat([top, cosine.topk(min(k, cosine.shape[1]), dim=1).values], dim=1)
            top = top.topk(min(k, top.shape[1]), dim=1).values
        kth.append(top[:, k - 1])
    return (torch.cat(kth) - ROUNDING).clamp(-1, 1)


def _cosine_blocks(
    features: Tensor, base: Tensor, self_rows: Tensor, rows: slice
) -> Iterator[tuple[int, Float32[Tensor, "rows columns"]]]:
    """First column and cosines of these queries with each block of the base; a query's own row is -inf."""
    query = features[rows].float()
    for columns in _spans(len(base), BLOCK_COLUMNS):
        cosine = query @ base[columns].float().T
        own = self_rows[rows] - columns.start
        here = ((own >= 0) & (own < cosine.shape[1])).nonzero()[:, 0]
        cosine[here, own[here]] = -torch.inf
        yield columns.start, cosine


def _spans(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _check_query(
    place: str, features: Tensor, base: Tensor | None, self_rows: Tensor | None, block_rows: int
) -> tuple[Tensor, Tensor]:
    """The base and each query's own row in it (-1: none), after checking that everything fits."""
    check_features(features, f"{place}, queries")
    if block_rows < 1:
        raise ValueError(f"{place}: block_rows = {block_rows}, needs at least 1; the default is 1024")
    if base is None:
        if self_rows is not None:
            raise ValueError(f"{place}: self_rows without a base; without a base a query's own row is known, drop them")
        return features, torch.arange(len(features), device=features.device)
    check_features(base, f"{place}, base")
    if base.shape[1] != features.shape[1]:
        raise ValueError(f"{place}: queries are {features.shape[1]} wide, base {base.shape[1]}; use one backbone's")
    if self_rows is None:
        return base, torch.full((len(features),), -1, device=features.device)
    if self_rows.shape != features.shape[:1] or self_rows.min() < -1 or self_rows.max() >= len(base):
        raise ValueError(
            f"{place}: self_rows {self_rows} for {len(features)} queries and {len(base)} base rows, needs one row of "
            "the base a query, or -1; pass the queries' positions in the base"
        )
    return base, self_rows
