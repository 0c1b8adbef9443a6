"""Radii chosen from data: one for all samples by coverage, or one a sample by its local density. Both are ours.

Shapes: N samples (the queries), M base rows, D width.
"""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from bd_core.radius_scan import check_query, place_csr, scan, spans

ROUNDING = 1e-6  # chosen radii are lowered by it, so that the edges they were made for survive another block size
FIRST_COLUMNS = 4096  # base rows whose cosines are looked at one by one; in the others only what is nearer
MOST_COLUMNS = 32768


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
    base, self_rows = check_query(place, features, base, self_rows, block_rows)
    others = len(base) - int((self_rows >= 0).any())
    if not 1 <= k <= others:
        raise ValueError(f"{place}: {k} neighbours asked for, {others} other rows in the base; choose 1 to {others}")
    base = base.float()
    kth = [_block_kth(features[rows].float(), k, base, self_rows[rows]) for rows in spans(len(features), block_rows)]
    return (torch.cat(kth) - ROUNDING).clamp(-1, 1)


def _block_kth(query_QD: Tensor, k: int, base_MD: Tensor, own_Q: Tensor) -> Tensor:
    """The k-th largest cosine of each query, own row left out: some base rows in full, then only what comes nearer."""
    stop = min(len(base_MD), max(FIRST_COLUMNS, k + 1))
    cosine = query_QD @ base_MD[:stop].T
    here = ((own_Q >= 0) & (own_Q < stop)).nonzero()[:, 0]
    cosine[here, own_Q[here]] = -torch.inf
    top = cosine.topk(k, dim=1).values
    while stop < len(base_MD):
        start, stop = stop, min(len(base_MD), stop + min(stop, MOST_COLUMNS))
        nearer = torch.nextafter(top[:, -1], top.new_tensor(torch.inf))
        hits, _ = scan(query_QD, base_MD[start:stop], nearer, own_Q=own_Q - start, exact=False)
        if len(hits.row) == 0:
            continue
        offsets, _, found = place_csr([hits], len(query_QD), query_QD.device)
        degree = offsets.diff()
        row = torch.repeat_interleave(degree)
        wide = top.new_full((len(query_QD), k + int(degree.max())), -torch.inf)
        wide[:, :k] = top
        wide[row, k + torch.arange(len(row), device=row.device) - offsets[row]] = found
        top = wide.topk(k, dim=1).values
    return top[:, -1]
