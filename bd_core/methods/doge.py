"""DOGE, adaptive projective gradient descent: one correction of all task vectors, learned from the weights alone.

Legend: K experts, M equal-shaped matrices worked on together, O output rows, I input columns, R rank of the shared
subspace, n entries of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.methods.selection import kth_smallest_rows
from bd_core.methods.stream import (
    BATCH_BYTES,
    Merged,
    StateDict,
    chunks,
    entrywise,
    expert_vectors,
    finish,
    matrix_names,
    merged_names,
    same_shape,
    unmerged,
)

__all__ = ["doge"]


def doge(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    scale: float = 0.07,
    keep: float = 0.3,
    subspace: int = 6,
    steps: int = 400,
    learning_rate: float = 1e-4,
) -> Merged:
    """theta_0 + sum_k lambda_k mask_k (tau_k + delta) of every matrix, lambda_k = `scale` / ||tau_k||_F.

    delta, one a matrix and starting at 0, minimises
        sum_j sum_o <tau_j[o], tau_j[o] - sum_k lambda_k (tau_k + delta)[o]>^2   over rows o,
    by `steps` of Adam, each gradient first projected off the shared subspace: the leading rank / `subspace` left
    singular vectors of the experts' own leading rank / K left singular vectors, put side by side. mask_k keeps the
    `keep` share of largest magnitudes of tau_k over all matrices. Everything that is no matrix stays the base's, and
    so do embedding tables. Zero task vectors have lambda 0 and no part in the subspace (ours; 0/0 as released), nor
    have directions without weight (ours). Raises ValueError where K exceeds a matrix's rank.

    Source: Wei et al., Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent, ICML 2025, in the
    released form, which FusionBench has, too (both pick their matrices by Hugging Face names; open_clip's joint
    attention weight is one matrix here and three there). The settings are theirs.
    Cost: K + 1 symmetric eigenvalue problems a matrix, then 4 K + 4 R multiply-adds an entry and step; memory: the
    task vectors of a batch of matrices and as much again at K = 8, in float32 (float64 stays).
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"doge: keep={keep} must lie in (0, 1]")
    if not math.isfinite(scale):
        raise ValueError(f"doge: scale={scale} must be finite")
    for name, count in (("subspace", subspace), ("steps", steps)):
        if count < 1:
            raise ValueError(f"doge: {name}={count} must be at least 1")
    if not learning_rate >= 0:
        raise ValueError(f"doge: learning_rate={learning_rate} must not be negative")

    def stream() -> Merged:
        names = matrix_names(base)
        for name in names:
            if len(experts) > min(base[name].shape):
                raise ValueError(
                    f"doge: {len(experts)} experts cannot share the rank of {name} {list(base[name].shape)}; "
                    "leave that matrix out or merge fewer experts"
                )
        least_K = _least_kept(base, experts, names, keep)
        # Adam's three tensors, delta and its gradient stand beside the task vectors. One large matrix fills a device.
        for batch in same_shape(base, names, len(experts) + 5, BATCH_BYTES // 8):
            moved = _steps(_stacked(base, experts, batch), least_K, scale, subspace, steps, learning_rate)
            for name, step_OI in zip(batch, moved, strict=True):
                yield name, finish(base[name], step_OI)
            del moved, step_OI  # not held while the next matrices are read
        rest = sorted(set(merged_names(base)) - set(names))
        # Read nonetheless: an expert that is not finite is refused wherever it is.
        yield from entrywise(base, experts, rest, lambda vectors_Kn, name, start: torch.zeros_like(vectors_Kn[0]))
        yield from unmerged(base, experts)

    return stream()


def _steps(
    vectors_MKOI: Float[Tensor, "M K O I"],
    least_K: Float[Tensor, " K"],
    scale: float,
    subspace: int,
    steps: int,
    learning_rate: float,
) -> Float[Tensor, "M O I"]:
    """sum_k lambda_k mask_k (tau_k + delta)."""
    lambda_MK = _lambdas(vectors_MKOI, scale)
    shared_MOR = _shared_subspace(vectors_MKOI, subspace)
    delta_MOI = _minimised(vectors_MKOI, lambda_MK, shared_MOR, steps, learning_rate)
    step_MOI = torch.zeros_like(delta_MOI)
    for k, tau_MOI in enumerate(vectors_MKOI.unbind(1)):
        mask_MOI = tau_MOI.abs() >= least_K[k]
        step_MOI += lambda_MK[:, k, None, None] * mask_MOI * (tau_MOI + delta_MOI)
    return step_MOI


def _stacked(base: StateDict, experts: Sequence[StateDict], names: Sequence[str]) -> Float[Tensor, "M K O I"]:
    first = expert_vectors(base, experts, names[0])
    if len(names) == 1:
        return first[None]
    stacked = first.new_empty((len(names), *first.shape))
    for m, name in enumerate(names):
        stacked[m] = first if m == 0 else expert_vectors(base, experts, name)
    return stacked


def _least_kept(
    base: StateDict, experts: Sequence[StateDict], names: Sequence[str], keep: float
) -> Float[Tensor, " K"]:
    """The smallest magnitude that stays in each expert's mask; equals stay, too."""
    size = sum(base[name].numel() for name in names)
    rank = size - int(size * keep)  # as released: one entry more than the share
    if rank < 1 or not names:
        return torch.zeros(len(experts))

    def magnitudes() -> Iterator[Tensor]:
        return (vectors_Kn.abs_() for _, _, vectors_Kn in chunks(base, experts, names))

    return kth_smallest_rows(magnitudes, [rank] * len(experts))


def _lambdas(vectors_MKOI: Float[Tensor, "M K O I"], scale: float) -> Float[Tensor, "M K"]:
    norm_MK = vectors_MKOI.flatten(2).norm(dim=2)
    return torch.where(norm_MK > 0, scale / norm_MK, 0.0)


def _shared_subspace(vectors_MKOI: Float[Tensor, "M K O I"], subspace: int) -> Float[Tensor, "M O R"]:
    """Orthonormal columns (or zero, where the experts span less) that the gradient is kept off."""
    full = min(vectors_MKOI.shape[2:])
    n_experts = vectors_MKOI.shape[1]
    bases = [_leading(vectors_MKOI[:, k].double(), full // n_experts) for k in range(n_experts)]
    # One expert's singular vectors are all equally much its own: the leading ones stay the leading ones (ours).
    shared = bases[0][:, :, : full // subspace] if n_experts == 1 else _leading(torch.cat(bases, 2), full // subspace)
    return shared.to(vectors_MKOI)


def _leading(matrices_MOI: Float[Tensor, "M O I"], rank: int) -> Float[Tensor, "M O R"]:
    """The first left singular vectors, with a zero column for each that no weight lies in.

    They come from the smaller Gram matrix, whose eigenvalues are the squares: hence float64.
    """
    n_rows, n_columns = matrices_MOI.shape[1:]
    is_wide = n_rows <= n_columns
    gram_MSS = matrices_MOI @ matrices_MOI.mT if is_wide else matrices_MOI.mT @ matrices_MOI
    value_MS, vector_MSS = torch.linalg.eigh(gram_MSS)
    first = value_MS.shape[1] - rank  # ascending order
    value_MR, vector_MSR = value_MS[:, first:].flip(1), vector_MSS[:, :, first:].flip(2)
    # What float32 rounding of a low-rank matrix leaves in its null space is no direction of the expert.
    least_M1 = value_MS[:, -1:] * (max(n_rows, n_columns) * torch.finfo(torch.float32).eps) ** 2
    is_real_MR = value_MR > least_M1
    left_MOR: Tensor = vector_MSR if is_wide else matrices_MOI @ vector_MSR / value_MR.clamp_min(1e-300).sqrt()[:, None]
    left_MOR *= is_real_MR[:, None]
    return left_MOR


def _minimised(
    vectors_MKOI: Float[Tensor, "M K O I"],
    lambda_MK: Float[Tensor, "M K"],
    shared_MOR: Float[Tensor, "M O R"],
    steps: int,
    learning_rate: float,
) -> Float[Tensor, "M O I"]:
    """delta after `steps` of projected Adam.

    The loss is quadratic: with c_jo = <tau_j[o], (tau_j - sum_k lambda_k tau_k)[o]> and L = sum_k lambda_k, its
    gradient at row o is sum_j -2 L (c_jo - L <tau_j[o], delta[o]>) tau_j[o]; a step needs no graph.
    """
    total_MOI = torch.einsum("mk,mkoi->moi", lambda_MK, vectors_MKOI)
    c_MKO = torch.stack([(tau_MOI * (tau_MOI - total_MOI)).sum(2) for tau_MOI in vectors_MKOI.unbind(1)], dim=1)
    weight_M11 = lambda_MK.sum(1)[:, None, None]
    delta_MOI = torch.zeros_like(total_MOI)
    optimiser = torch.optim.Adam([delta_MOI], lr=learning_rate)
    for _ in range(steps):
        along_MKO = torch.einsum("mkoi,moi->mko", vectors_MKOI, delta_MOI)
        pull_MKO = -2 * weight_M11 * (c_MKO - weight_M11 * along_MKO)
        gradient_MOI = torch.zeros_like(delta_MOI)
        for k in range(vectors_MKOI.shape[1]):  # an einsum here would copy all task vectors
            gradient_MOI.addcmul_(pull_MKO[:, k, :, None], vectors_MKOI[:, k])
        delta_MOI.grad = gradient_MOI.sub_(shared_MOR @ (shared_MOR.mT @ gradient_MOI))
        optimiser.step()
    return delta_MOI
