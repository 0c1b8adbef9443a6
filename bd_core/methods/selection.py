"""The k-th smallest of a stream of numbers, exact, without sorting or holding them.

Legend: R rows (streams read side by side), n entries of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["kth_smallest", "kth_smallest_rows"]

SAMPLED = 2**18  # entries a row is judged by: the bracket around the k-th is about 1 % of the entries wide
SPREAD = 8.0  # half the bracket's width in standard errors of the sampled rank


def kth_smallest(chunks: Callable[[], Iterator[Float[Tensor, " n"]]], k: int) -> float:
    """The k-th smallest entry, k from 1, of all chunks together; see `kth_smallest_rows`."""
    return float(kth_smallest_rows(lambda: (chunk[None] for chunk in chunks()), [k])[0])


def kth_smallest_rows(chunks: Callable[[], Iterator[Float[Tensor, "R n"]]], ks: Sequence[int]) -> Float[Tensor, " R"]:
    """The ks[r]-th smallest entry, counted from 1, of row r over all chunks; exact.

    `chunks()` starts the stream anew; it is read twice, and once more for a bracket that missed. A first reading
    samples every row evenly, which brackets the k-th entry; a second counts what lies below the bracket and keeps what
    lies in it. Memory: the sample and about 1 % of the entries. Raises ValueError for no entries or k outside 1..n.
    """
    total = 0
    samples: list[Tensor] = []
    stride = 1
    for chunk in chunks():
        # The sample starts whole and is thinned by two whenever it grows too long.
        samples.append(chunk[:, -total % stride :: stride].clone())
        total += chunk.shape[1]
        if sum(sample.shape[1] for sample in samples) > 2 * SAMPLED:
            samples = [torch.cat(samples, dim=1)[:, ::2]]
            stride *= 2
    if not total or not all(1 <= k <= total for k in ks):
        raise ValueError(f"kth_smallest: k = {list(ks)} of {total} entries; k counts from 1 to their number")
    sample = torch.cat(samples, dim=1).sort(dim=1).values
    k_R = torch.tensor(ks, device=sample.device)
    if stride == 1:
        return sample.gather(1, k_R[:, None] - 1)[:, 0]
    size, share = sample.shape[1], k_R.double() / total
    half = SPREAD * (share * (1 - share) / size).sqrt() + 2.0 / size
    while True:
        low, high = ((share + sign * half) * size for sign in (-1, 1))
        first = sample.gather(1, low.long().clamp(0, size - 1)[:, None])
        last = sample.gather(1, high.long().clamp(0, size - 1)[:, None])
        first[low < 0] = -torch.inf
        last[high >= size - 1] = torch.inf
        found = _within(chunks, k_R, first, last)
        if found is not None:
            return found
        half = half * 8  # the rows were not alike along the stream, so the sample misled: a wider bracket


def _within(chunks: Callable[[], Iterator[Tensor]], k_R: Tensor, first_R1: Tensor, last_R1: Tensor) -> Tensor | None:
    """The wanted entries if every one lies in its row's bracket [first, last], None otherwise."""
    below_R = torch.zeros_like(k_R)
    inside: list[list[Tensor]] = [[] for _ in k_R]
    for chunk in chunks():
        under = chunk < first_R1
        below_R += under.sum(1)
        here = under.logical_or_(chunk > last_R1).logical_not_()
        for row, mask in enumerate(here):
            inside[row].append(chunk[row][mask])
    found = []
    for row, parts in enumerate(inside):
        kept, rank = torch.cat(parts), int(k_R[row] - below_R[row])
        if not 1 <= rank <= len(kept):
            return None
        found.append(kept.kthvalue(rank).values)
    return torch.stack(found)
