"""The k-th smallest of a stream of numbers, exact, without sorting or holding them.

Legend: R rows (streams read side by side), n entries of a chunk, S entries sampled of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["kth_smallest", "kth_smallest_rows"]

Rows = Iterator[Float[Tensor, "R n"]]
Thinned = tuple[Callable[[int], Rows], int]

SAMPLED = 2**18  # entries a row is judged by, at most: the bracket around the k-th is about 1 % of the entries wide
LEAST = 2**12
SPREAD = 6.0  # half the bracket's width in standard errors of the sampled rank


def kth_smallest(chunks: Callable[[], Iterator[Float[Tensor, " n"]]], k: int) -> float:
    """The k-th smallest entry, k from 1, of all chunks together; see `kth_smallest_rows`."""
    return float(kth_smallest_rows(lambda: (chunk[None] for chunk in chunks()), [k])[0])


def kth_smallest_rows(
    chunks: Callable[[], Rows], ks: Sequence[int], *, thinned: Thinned | None = None
) -> Float[Tensor, " R"]:
    """The ks[r]-th smallest entry, counted from 1, of row r over all chunks; exact.

    `chunks()` starts the stream anew; it is read twice, and once more for a bracket that missed. A first reading
    samples every row evenly, which brackets the k-th entry; a second counts what lies below the bracket and keeps what
    lies in it. `thinned`, a function of a stride that gives every stride-th column of the stream, and the number of
    all columns, spares most of the first reading. Memory: the sample and about 1 % of the entries. Raises ValueError
    for no entries or k outside 1..n.
    """
    sample_RS, total = _thinned(*thinned) if thinned is not None else _sampled(chunks())
    if not total or not all(1 <= k <= total for k in ks):
        raise ValueError(f"kth_smallest: k = {list(ks)} of {total} entries; k counts from 1 to their number")
    sample_RS = sample_RS.sort(dim=1).values
    k_R = torch.tensor(ks, device=sample_RS.device)
    size = sample_RS.shape[1]
    if size == total:
        return sample_RS.gather(1, k_R[:, None] - 1)[:, 0]
    share = k_R.double() / total
    half = SPREAD * (share * (1 - share) / size).sqrt() + 2.0 / size
    while True:
        low, high = ((share + sign * half) * size for sign in (-1, 1))
        first = sample_RS.gather(1, low.long().clamp(0, size - 1)[:, None])
        last = sample_RS.gather(1, high.long().clamp(0, size - 1)[:, None])
        first[low < 0] = -torch.inf
        last[high >= size - 1] = torch.inf
        found = _within(chunks, k_R, first, last)
        if found is not None:
            return found
        half = half * 8  # the rows were not alike along the stream, so the sample misled: a wider bracket


def _thinned(columns: Callable[[int], Rows], total: int) -> tuple[Tensor, int]:
    """At most about SAMPLED columns, evenly spaced, and the number of all."""
    # Sorting a sample of S costs about S, looking into its bracket n / sqrt(S): even at S = n^(2/3).
    wanted = min(SAMPLED, max(LEAST, round(total ** (2 / 3))))
    held: _Growing | None = None
    for chunk in columns(max(1, total // wanted)):
        held = _Growing(chunk) if held is None else held
        held.add(chunk)
    return (torch.zeros(0, 0) if held is None else held.columns()), total


def _sampled(chunks: Rows) -> tuple[Tensor, int]:
    """At most 2 SAMPLED columns, evenly spaced, and the number of all."""
    total, stride = 0, 1
    held: _Growing | None = None
    for chunk in chunks:
        held = _Growing(chunk) if held is None else held
        held.add(chunk[:, -total % stride :: stride])
        total += chunk.shape[1]
        # The sample starts whole and is thinned by two whenever it grows too long.
        while held.length > 2 * SAMPLED:
            held.thin()
            stride *= 2
    return (torch.zeros(0, 0) if held is None else held.columns()), total


def _within(chunks: Callable[[], Rows], k_R: Tensor, first_R1: Tensor, last_R1: Tensor) -> Tensor | None:
    """The wanted entries if every one lies in its row's bracket [first, last], None otherwise."""
    below_R = torch.zeros_like(k_R)
    inside: list[_Growing] | None = None
    spare = torch.empty(0)
    for chunk in chunks():
        inside = [_Growing(row[None]) for row in chunk] if inside is None else inside
        if spare.numel() < 2 * chunk.numel() or spare.dtype != chunk.dtype:
            spare = chunk.new_empty(2 * chunk.numel())
        over_Rn, depth_Rn = (part[: chunk.numel()].view(chunk.shape) for part in spare.chunk(2))
        # Boolean tensors are slow to make and to read: what is positive is in the bracket, to the last bit.
        under_R1 = torch.nextafter(first_R1.to(chunk), chunk.new_tensor(-torch.inf))
        above_R1 = torch.nextafter(last_R1.to(chunk), chunk.new_tensor(torch.inf))
        torch.sub(chunk, under_R1, out=over_Rn).clamp_min_(0)
        torch.sub(above_R1, chunk, out=depth_Rn)
        torch.minimum(over_Rn, depth_Rn, out=depth_Rn).clamp_min_(0)
        exact = None if chunk.shape[1] <= 2**24 else torch.float64
        below_R += chunk.shape[1] - over_Rn.sign_().sum(1, dtype=exact).long()
        for row, held in enumerate(inside):
            held.add(chunk[row, _positive(depth_Rn[row])][None])
    found = []
    for row, held in enumerate(inside or []):
        kept, rank = held.columns()[0], int(k_R[row] - below_R[row])
        if not 1 <= rank <= len(kept):
            return None
        found.append(kept.kthvalue(rank).values)
    return torch.stack(found)


class _Growing:
    """Columns put end to end in one buffer: many small tensors would hold the heap's freed chunks in place."""

    def __init__(self, like: Tensor) -> None:
        self._buffer = like.new_empty((like.shape[0], 2**12))
        self.length = 0

    def add(self, columns: Float[Tensor, "R n"]) -> None:
        """Put these behind the others."""
        end = self.length + columns.shape[1]
        if end > self._buffer.shape[1]:
            larger = self._buffer.new_empty((len(self._buffer), max(end, 2 * self._buffer.shape[1])))
            larger[:, : self.length] = self.columns()
            self._buffer = larger
        self._buffer[:, self.length : end] = columns
        self.length = end

    def thin(self) -> None:
        """Keep every second column."""
        kept = self.columns()[:, ::2].clone()
        self.length = kept.shape[1]
        self._buffer[:, : self.length] = kept

    def columns(self) -> Float[Tensor, "R n"]:
        """All of them; a view, until more are added."""
        return self._buffer[:, : self.length]


def _positive(depth_n: Float[Tensor, " n"]) -> Tensor:
    """The places of the entries above zero; two at a time, for few are."""
    if depth_n.dtype != torch.float32 or len(depth_n) % 2 or depth_n.storage_offset() % 2:
        return depth_n.nonzero()[:, 0]
    pairs = depth_n.view(torch.int64).nonzero()[:, 0] * 2
    places = torch.cat((pairs, pairs + 1))
    return places[depth_n[places] > 0]
