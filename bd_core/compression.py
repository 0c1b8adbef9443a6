"""Task vectors cut by SVD.

Legend: K experts, O output rows, I input columns, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.task_vectors import TaskVectors

__all__ = ["CompressedVectors", "svd_compress"]


@dataclass(frozen=True)
class CompressedVectors:
    """Task vectors with their matrices as rank-R factors: tau_k ~ left_k right_k.

    `factors[name]` = (left [K, O, R], right [K, R, I]) for matrices (convolution kernels flattened to [O, I]),
    `dense[name]` [K, ...] for what is not cut (vectors, small matrices), `shapes[name]` a parameter's own shape,
    `relative_error[name]` = ||tau - left right||_F / ||tau||_F over all K together (0 for a zero vector).
    """

    factors: dict[str, tuple[Float[Tensor, "K O R"], Float[Tensor, "K R I"]]]
    dense: dict[str, Float[Tensor, "K ..."]]
    constants: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    relative_error: dict[str, float]

    @property
    def n_experts(self) -> int:
        """K."""
        return len(next(iter(self.dense.values()))) if self.dense else len(next(iter(self.factors.values()))[0])

    @property
    def size_bytes(self) -> int:
        """Bytes of all K experts' factors and uncut tensors."""
        tensors = [*self.dense.values(), *(part for pair in self.factors.values() for part in pair)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def expanded(self) -> TaskVectors:
        """The task vectors these factors stand for, dense again: K copies of the model."""
        vectors = {
            name: self.dense[name]
            if name in self.dense
            else torch.bmm(*self.factors[name]).reshape(-1, *self.shapes[name])
            for name in self.shapes
        }
        return TaskVectors(vectors, self.constants)


def svd_compress(
    vectors: TaskVectors, *, rank: int | None = None, rank_share: float | None = None, energy: float | None = None
) -> CompressedVectors:
    """Task vectors whose matrices are cut to their leading singular triplets; exactly one criterion is given.

    `rank`: that many; `rank_share`: that share of min(O, I), rounded up; `energy`: the fewest triplets that keep this
    share of every expert's squared norm. Matrices that the cut would not make smaller, R (O + I) >= O I, stay dense.
    """
    if sum(given is not None for given in (rank, rank_share, energy)) != 1:
        raise ValueError(f"give exactly one of rank={rank}, rank_share={rank_share}, energy={energy}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    for name, share in (("rank_share", rank_share), ("energy", energy)):
        if share is not None and not 0.0 < share <= 1.0:
            raise ValueError(f"{name}={share} must lie in (0, 1]")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    dense: dict[str, Tensor] = {}
    relative_error: dict[str, float] = {}
    for name, stacked in vectors.vectors.items():
        cut = _cut(stacked, rank, rank_share, energy) if stacked.ndim >= 3 else None
        if cut is None:
            dense[name] = stacked
            relative_error[name] = 0.0
        else:
            left, right, relative_error[name] = cut
            factors[name] = (left, right)
    shapes = {name: tuple(stacked.shape[1:]) for name, stacked in vectors.vectors.items()}
    return CompressedVectors(factors, dense, vectors.constants, shapes, relative_error)


def _cut(
    stacked: Tensor, rank: int | None, rank_share: float | None, energy: float | None
) -> tuple[Tensor, Tensor, float] | None:
    matrices_KOI = stacked.flatten(2)
    n_rows, n_columns = matrices_KOI.shape[1:]
    full = min(n_rows, n_columns)
    if rank is None and rank_share is not None:
        rank = _ceil(rank_share * full)
    if rank is not None and rank * (n_rows + n_columns) >= n_rows * n_columns:
        return None
    u_KOF, s_KF, vh_KFI = torch.linalg.svd(matrices_KOI, full_matrices=False)
    if rank is None:
        assert energy is not None
        kept_KF = s_KF.square().cumsum(1)
        # One rank for all K, the largest any of them needs, so that the factors stack. The 1e-6 is float32 rounding.
        needed_K = (kept_KF < (energy - 1e-6) * kept_KF[:, -1:]).sum(1) + 1
        rank = int(needed_K.max().clamp(max=full))
        if rank * (n_rows + n_columns) >= n_rows * n_columns:
            return None
    total = float(torch.linalg.vector_norm(s_KF))
    lost = float(torch.linalg.vector_norm(s_KF[:, rank:]))
    left_KOR = (u_KOF[:, :, :rank] * s_KF[:, None, :rank]).contiguous()
    return left_KOR, vh_KFI[:, :rank].contiguous(), lost / total if total else 0.0


def _ceil(value: float) -> int:
    # At least 1; 0.1 * 30 counts as 3, not as 3.0000000000000004.
    return max(1, math.ceil(value - 1e-9))
