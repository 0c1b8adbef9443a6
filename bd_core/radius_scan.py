"""The pairs of a block of queries and a base whose cosine reaches a radius, and their counting into CSR.

Shapes: Q queries, M base rows, D width, E edges, H hits.

The rule, whatever the device, the dtype of the product or the blocks: a pair is an edge when the product of its two
float32 rows, rounded once to float32, is at or above the radius as float32. A float32 product decides that wherever it
is further from the radius than `rounding_bound`; nearer pairs are made again in float64. A product in bfloat16 only
picks candidates, with its own wider bound, and each of them is made again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int32, Int64, Integer
from torch import Tensor

from bd_core.checks import check_features
from bd_core.graph_kernel import kernel_place, kernel_runs, kernel_scan

BLOCK_COLUMNS = 4096
EXACT_VALUES = 2**22  # numbers gathered at a time where pairs are made again
LENGTH = 1.0021  # the largest product of two accepted lengths, (1 + NORM_TOLERANCE)^2, rounded up


@dataclass(frozen=True, eq=False)
class Hits:
    """Pairs in an order that keeps each row's columns rising: `row` in the block, `column` in what it is held against.

    `shift` is added to columns when they become neighbours.
    """

    row: Int32[Tensor, " H"]
    column: Int32[Tensor, " H"]
    cosine: Float32[Tensor, " H"]
    shift: int = 0


def rounding_bound(width: int, dtype: torch.dtype = torch.float32) -> float:
    """How far a cosine of unit rows of this width, multiplied in dtype and summed in float32, can be off.

    Summing adds at most `width` roundings of 2^-24. In bfloat16 two factors and the result are rounded too, 2^-8 each;
    a float32 product for which torch may use less than float32 (TF32) counts as that.
    """
    summing = width * 2.0**-24
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return LENGTH * summing
    if dtype in (torch.float32, torch.bfloat16):
        return LENGTH * (3 * 2.0**-8 + 2 * 2.0**-16 + summing)
    raise ValueError(f"rounding_bound: no bound is known for products in {dtype}; use torch.float32 or torch.bfloat16")


def exact_cosine(
    query_QD: Float32[Tensor, "Q D"],
    base_MD: Float32[Tensor, "M D"],
    row_E: Integer[Tensor, " E"],
    column_E: Integer[Tensor, " E"],
) -> Float32[Tensor, " E"]:
    """The cosine of each pair as the rule has it: summed in float64, rounded once to float32."""
    cosine_E = query_QD.new_empty(len(row_E))
    for edges in spans(len(row_E), max(1, EXACT_VALUES // query_QD.shape[1])):
        first, second = query_QD[row_E[edges].long()].double(), base_MD[column_E[edges].long()].double()
        cosine_E[edges] = first.mul_(second).sum(dim=1).float()
    return cosine_E


def scan(
    query_QD: Float32[Tensor, "Q D"],
    base_MD: Float32[Tensor, "M D"],
    radius_Q: Float32[Tensor, " Q"],
    *,
    own_Q: Int64[Tensor, " Q"] | None = None,
    base_radius_M: Float32[Tensor, " M"] | None = None,
    first_query: int | None = None,
    block: int = BLOCK_COLUMNS,
    product: torch.dtype = torch.float32,
    exact: bool = True,
) -> tuple[Hits, list[Hits]]:
    """Edges from each query into the base, and, with a base_radius_M, the edges to the queries from each base block.

    Blocks have `block` base rows. own_Q has each query's own base row, -1 for none. Or first_query says that query i is
    base row first_query + i and that only base rows above its own count, each pair once; blocks then begin at
    first_query. In the edges back, rows count from their block's start and columns are queries. exact=False takes
    float32 products as they come.
    """
    band = rounding_bound(base_MD.shape[1], product) if exact else 0.0
    first_base = 0 if first_query is None else first_query
    starts = range(first_base, len(base_MD), block)
    if product == torch.float32 and kernel_runs(query_QD, base_MD):
        upper = -1 if first_query is None else first_query
        counts, *found = kernel_scan(query_QD, base_MD, radius_Q, base_radius_M, own_Q, upper, first_base, block, band)
        there, *back = (Hits(*hits) for hits in zip(*(torch.split(each, counts) for each in found), strict=True))
        return there, [Hits(hit.column - start, hit.row, hit.cosine) for hit, start in zip(back, starts, strict=True)]
    # Products that may be off by more than a float32's rounding only pick candidates.
    coarse = product != torch.float32 or torch.get_float32_matmul_precision() != "highest"
    there_parts, back_parts = [], []
    factor_QD, room = query_QD.to(product), query_QD.new_empty(len(query_QD) * block, dtype=product)
    for start in starts:
        cosine_QB = room[: len(query_QD) * min(block, len(base_MD) - start)].view(len(query_QD), -1)
        torch.mm(factor_QD, base_MD[start : start + block].to(product).T, out=cosine_QB)
        radius_B = None if base_radius_M is None else base_radius_M[start : start + block]
        row_H, column_H = _candidates(cosine_QB, radius_Q, radius_B, band)
        other = column_H + (start if first_query is None else start - first_query)
        keep_H = other > row_H if first_query is not None else torch.ones_like(row_H, dtype=torch.bool)
        if own_Q is not None:
            keep_H = other != own_Q[row_H]
        row_H, column_H = row_H[keep_H], column_H[keep_H]
        cosine_H = cosine_QB[row_H, column_H].float()
        if coarse and exact:
            cosine_H = exact_cosine(query_QD, base_MD[start : start + block], row_H, column_H)
        pairs = (query_QD, base_MD[start : start + block], row_H, column_H, cosine_H, 0.0 if coarse else band)
        there_parts.append(_edges(*pairs, radius_Q[row_H], start))
        if radius_B is not None:
            edges = _edges(*pairs, radius_B[column_H], 0)
            back_parts.append(Hits(edges.column, edges.row, edges.cosine))
    return _joined(there_parts), back_parts


def place_csr(
    parts: Sequence[Hits], n_rows: int, device: torch.device
) -> tuple[Int64[Tensor, " boundaries"], Int64[Tensor, " E"], Float32[Tensor, " E"]]:
    """offsets [n_rows + 1], neighbours and cosines of all parts; each row's edges keep the order they come in."""
    degree = torch.zeros(n_rows, dtype=torch.int64, device=device)
    for part in parts:
        degree += torch.bincount(part.row, minlength=n_rows)
    offsets = torch.cat([degree.new_zeros(1), degree.cumsum(0)])
    total = sum(len(part.row) for part in parts)
    cosine = torch.empty(total, dtype=torch.float32, device=device)
    if kernel_runs(cosine):
        neighbours, place = torch.empty(total, dtype=torch.int64), offsets[:-1].clone()
        for part in parts:
            kernel_place(part.row, part.column, part.cosine, part.shift, place, neighbours, cosine)
        return offsets, neighbours, cosine
    whole = _joined([Hits(part.row, part.column + part.shift, part.cosine) for part in parts])
    order = whole.row.argsort(stable=True)
    return offsets, whole.column[order].long(), whole.cosine[order]


def _joined(parts: list[Hits]) -> Hits:
    return Hits(
        torch.cat([part.row for part in parts]),
        torch.cat([part.column for part in parts]),
        torch.cat([part.cosine for part in parts]),
    )


def spans(total: int, size: int) -> Iterator[slice]:
    """0 to total in slices of `size`, the last one shorter."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def check_query(
    place: str, features: Tensor, base: Tensor | None, self_rows: Tensor | None, block_rows: int | None
) -> tuple[Tensor, Tensor]:
    """The base and each query's own row in it (-1: none), after checking that everything fits."""
    check_features(features, f"{place}, queries")
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"{place}: block_rows = {block_rows}, needs at least 1; leave it out for the default")
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


def _candidates(
    cosine_QB: Tensor, radius_Q: Tensor, radius_B: Tensor | None, band: float
) -> tuple[Int64[Tensor, " H"], Int64[Tensor, " H"]]:
    """Rows and columns of the pairs that may be edges one way or the other, row by row."""
    least = radius_Q.min() if radius_B is None else torch.minimum(radius_Q.min(), radius_B.min())
    if cosine_QB.device.type == "cpu" and cosine_QB.amax() < least - band:  # most blocks of spread-out data
        nothing = torch.empty(0, dtype=torch.int64)
        return nothing, nothing
    inside = cosine_QB >= (radius_Q - band)[:, None]
    if radius_B is not None:
        inside |= cosine_QB >= (radius_B - band)[None, :]
    row_H, column_H = inside.nonzero(as_tuple=True)
    return row_H, column_H


def _edges(
    query: Tensor, base: Tensor, row: Tensor, column: Tensor, cosine: Tensor, band: float, radius: Tensor, shift: int
) -> Hits:
    """The candidates that are edges under these radii, one each, by the rule; columns moved on by shift."""
    unsure = (cosine - radius).abs() <= band
    if band and unsure.any():
        cosine = cosine.clone()
        cosine[unsure] = exact_cosine(query, base, row[unsure], column[unsure])
    inside = cosine >= radius
    return Hits(row[inside].int(), (column[inside] + shift).int(), cosine[inside])
