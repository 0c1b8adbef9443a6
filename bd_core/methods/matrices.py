"""Linear algebra that the matrix methods share, batched over layers of equal shape.

Legend: B layers of equal shape, K experts, O output rows, I input columns, N rows, C <= N columns, R kept rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.methods.stream import (
    Merged,
    StateDict,
    averaged,
    entrywise,
    finish,
    merged_names,
    same_shape,
    unmerged,
)
from bd_core.task_vectors import refuse_nonfinite, widened

__all__ = [
    "LAYER_BYTES",
    "PROJECTIONS",
    "Polar",
    "add_gram",
    "by_layers",
    "concurrently",
    "expert_layers",
    "gram",
    "kept",
    "leading_part",
    "polar",
    "right_solve",
]

# One expert's task vectors of equal-shaped layers taken together (ours): on a CPU batching saves little, so the
# working set stays small beside a ViT-B/32; give more on an accelerator, where small layers wait for each other.
LAYER_BYTES = 4 << 20
LAYERS_AT_ONCE = 4  # worked on beside each other where threads allow, each with scratch of its own (ours)
# Matrices outside attention and MLP that are no embedding: projections to the joint space and classification heads.
PROJECTIONS = (r"(^|\.)proj$", r"(text|visual)_projection", r"(^|\.)(lm_head|classifier|head)\b", r"^fc\.weight$")

# Singular values below this share of the largest are rounding, not directions (LAPACK's error is a few eps).
ROUNDING_EPS = 32
GRAM_ROUNDING_EPS = 64  # the same of a Gram matrix' eigenvalues and pivots
# Forming a Gram matrix squares the condition number: above these its result is still good to about 1e-6 (measured).
POLAR_CONDITION = {torch.float32: 1e-2, torch.float64: 1e-9}
LEADING_CONDITION = 3e-5
# Of eigenvalues, the R-th to the first: above this (singular values within 1 : 8) the Gram matrix in float32 gives the
# subspace better than an SVD in float32 does: measured, 1.5 to 30 times at 120 to 3072 rows; from 1 : 15 on not always.
GRAM_CONDITION = 1 / 64
MIRRORED_COLUMNS = 512
# A rotation below this leaves a second-order error under float32's rounding.
SMALL_ROTATION = 1e-3
REFINEMENTS = 3


Item = TypeVar("Item")
Result = TypeVar("Result")


class Polar(NamedTuple):
    """The polar factor `left @ right` of a matrix, as two factors, and its singular values (dropped ones are zero)."""

    left: Float[Tensor, "B N C"]
    right: Float[Tensor, "B C C"]
    values: Float[Tensor, "B C"]


def expert_layers(
    base: StateDict, experts: Sequence[StateDict], names: Sequence[str]
) -> Iterator[Float[Tensor, "B O I"]]:
    """The task vectors of the named layers, one expert after another, in float32 (float64 stays).

    One buffer serves all experts: it is the reader's to change, and gone when the next expert is asked for. Raises
    ValueError naming the tensor and the expert where a value is not finite.
    """
    origin_BOI = torch.stack([widened(base[name]) for name in names])
    vectors_BOI = torch.empty_like(origin_BOI)
    for k, expert in enumerate(experts):
        for row, name in zip(vectors_BOI, names, strict=True):
            row.copy_(expert[name].detach())
        vectors_BOI -= origin_BOI
        if not bool(torch.isfinite(vectors_BOI.sum())):
            for name in names:
                refuse_nonfinite(name, expert[name], base[name], f"expert {k}")
            if not bool(torch.isfinite(vectors_BOI).all()):
                raise ValueError(f"expert {k}: a task vector of {', '.join(names)} overflows; its values are too large")
        yield vectors_BOI


def concurrently(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map`, with a few items worked on beside each other, torch's threads shared out among them; results in order.

    The decomposition of one layer gains little from a second thread, two decompositions beside each other all of it.
    """
    n_threads = torch.get_num_threads()
    n_workers = min(n_threads, LAYERS_AT_ONCE)
    if n_workers == 1:
        yield from map(work, items)
        return
    running: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(n_threads // n_workers,)) as pool:
        try:
            for item in items:
                running.append(pool.submit(torch.no_grad()(work), item))
                if len(running) > n_workers:  # one waits, so that no worker does
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for left in running:
                left.cancel()
            torch.set_num_threads(n_threads)  # a worker's own setting becomes the default of threads to come


def by_layers(
    base: StateDict,
    experts: Sequence[StateDict],
    matrices: Sequence[str],
    budget_bytes: int,
    steps: Callable[[list[str]], Iterable[Float[Tensor, "O I"]]],
    rest: Callable[[StateDict, Sequence[StateDict], Sequence[str]], Merged] = averaged,
    *,
    beside: bool = False,
) -> Merged:
    """theta_0 + step of every matrix, `steps` taking equal-shaped ones together; `rest` of whatever else is merged.

    `beside` takes several such batches at once, each with scratch of its own, see `concurrently`.
    """
    batches = list(same_shape(base, matrices, 1, budget_bytes))
    for names, made in zip(batches, concurrently(steps, batches) if beside else map(steps, batches), strict=True):
        for name, step_OI in zip(names, made, strict=True):
            yield name, finish(base[name], step_OI)
    layers = set(matrices)
    yield from rest(base, experts, [name for name in merged_names(base) if name not in layers])
    yield from unmerged(base, experts)


def kept(base: StateDict, experts: Sequence[StateDict], names: Sequence[str]) -> Merged:
    """theta_0 of every named tensor, whatever the experts hold; they are read only to refuse NaN and infinities."""
    return entrywise(base, experts, names, lambda vectors_Kn, name, start: vectors_Kn[0].zero_())


def add_gram(
    gram_BII: Float[Tensor, "B I I"],
    product_BOI: Float[Tensor, "B O I"],
    left_BOI: Float[Tensor, "B O I"],
    vectors_BOI: Float[Tensor, "B O I"],
) -> None:
    """Adds V^T V to `gram` and `left` V^T V to `product`, in place, by the cheaper order of products."""
    n_rows, n_columns = vectors_BOI.shape[1:]
    if n_rows >= n_columns:
        own_BII = gram(vectors_BOI)
        gram_BII += own_BII
        product_BOI.baddbmm_(left_BOI, own_BII)
    else:
        gram_BII.baddbmm_(vectors_BOI.mT, vectors_BOI)
        product_BOI.baddbmm_(left_BOI @ vectors_BOI.mT, vectors_BOI)


def right_solve(
    product_BOI: Float[Tensor, "B O I"], gram_BII: Float[Tensor, "B I I"], ridge: float | Float[Tensor, " B"] = 0.0
) -> Float[Tensor, "B O I"]:
    """X = product (gram + ridge I)^+ for symmetric gram >= 0, solved in float64 and given in the product's dtype.

    By Cholesky; where that fails or its pivots say that the matrix is singular to the rounding of `gram`'s dtype, by
    the pseudo-inverse from an eigendecomposition: directions at or below rounding get zero.
    """
    ridge_B = torch.as_tensor(ridge, dtype=torch.float64, device=gram_BII.device).expand(len(gram_BII))
    rounding = GRAM_ROUNDING_EPS * torch.finfo(gram_BII.dtype).eps
    result = torch.empty_like(product_BOI)
    for gram_II, own_ridge, product_OI, out_OI in zip(gram_BII, ridge_B, product_BOI, result, strict=True):
        factor_II = _ridged(gram_II, own_ridge)
        failed = torch.zeros((), dtype=torch.int32, device=factor_II.device)
        torch.linalg.cholesky_ex(factor_II, out=(factor_II, failed))  # in place: the matrix may be large
        pivots_I = factor_II.diagonal().square()
        if not failed and bool(pivots_I.min() > rounding * pivots_I.max()):
            out_OI.copy_(torch.cholesky_solve(product_OI.double().mT, factor_II).mT)
            continue
        values_I, vectors_II = torch.linalg.eigh(_ridged(gram_II, own_ridge))
        inverse_I = torch.where(values_I > rounding * values_I[-1].clamp_min(0), 1 / values_I, 0.0)
        out_OI.copy_((product_OI.double() @ vectors_II * inverse_I) @ vectors_II.mT)
    return result


def gram(matrix_BNC: Float[Tensor, "B N C"]) -> Float[Tensor, "B C C"]:
    """M^T M; of wide enough results only ten of sixteen blocks are computed, the others are mirrored."""
    n_columns = matrix_BNC.shape[2]
    if n_columns < MIRRORED_COLUMNS:
        return matrix_BNC.mT @ matrix_BNC
    result_BCC = matrix_BNC.new_empty((len(matrix_BNC), n_columns, n_columns))
    parts = [range(n_columns)[i * n_columns // 4 : (i + 1) * n_columns // 4] for i in range(4)]
    for i, part in enumerate(parts):
        rows, columns = slice(part.start, part.stop), slice(part.start, n_columns)
        strip_BPC = matrix_BNC[:, :, rows].mT @ matrix_BNC[:, :, columns]
        result_BCC[:, rows, columns] = strip_BPC
        if i + 1 < len(parts):
            result_BCC[:, part.stop :, rows] = strip_BPC[:, :, len(part) :].mT
    return result_BCC


def polar(matrix_BNC: Float[Tensor, "B N C"], dtype: torch.dtype) -> Polar:
    """U V^T of M = U S V^T for N >= C in `dtype`, with singular directions at or below rounding left out.

    By (M^T M)^(-1/2), one eigendecomposition of size C: in `dtype` where M is well-conditioned, otherwise in float64 if
    M came so, otherwise by SVD. Nearly square ones are not tried in float32: the smallest singular value of a square
    matrix without structure is about 1/C of the largest.
    """
    tried = [] if _nearly_square(matrix_BNC) else [dtype]
    tried += [torch.float64] if matrix_BNC.dtype == torch.float64 and torch.float64 not in tried else []
    for precision in tried:
        values_BC, vectors_BCC = torch.linalg.eigh(gram(matrix_BNC.to(precision)))
        if bool((values_BC[:, 0] > POLAR_CONDITION[precision] * values_BC[:, -1]).all()):
            root_BC = values_BC.sqrt()
            right_BCC = (vectors_BCC / root_BC[:, None]) @ vectors_BCC.mT
            if precision != dtype:  # ill-conditioned: both factors are large and cancel, so they are joined first
                return Polar((matrix_BNC @ right_BCC).to(dtype), _identity_like(right_BCC, dtype), root_BC.to(dtype))
            return Polar(matrix_BNC.to(dtype), right_BCC, root_BC)
    left_BNC, values_BC, right_BCC = torch.linalg.svd(matrix_BNC, full_matrices=False)
    values_BC = values_BC * _above_rounding(values_BC, dtype)
    return Polar((left_BNC * (values_BC > 0)[:, None]).to(dtype), right_BCC.to(dtype), values_BC.to(dtype))


def leading_part(
    matrix_BNC: Float[Tensor, "B N C"], rank: int
) -> tuple[Float[Tensor, "B N R"], Float[Tensor, "B R R"], Float[Tensor, "B C R"]]:
    """(left, core, right): left core right^T is the best rank-R approximation of each matrix, N >= C >= R.

    The columns of left and right (float64) are orthonormal bases of the leading singular subspaces; the core is full:
    the singular vectors themselves are never needed. Columns beyond a matrix's own rank are zero.

    Subspaces by the eigenvectors of M^T M, rotated to first order in float64 against M^T M or, where the R-th singular
    value is smaller beside the first, against M^T (M W): either is more accurate than an SVD in float32. By SVD where
    it is too small for that as well.
    """
    if rank < matrix_BNC.shape[2]:
        right_BCR = _leading_right(matrix_BNC, rank)
        if right_BCR is not None:
            # On the long side bases of several matrices stay far from singular: float32 is enough there.
            precision = torch.float64 if _nearly_square(matrix_BNC) else matrix_BNC.dtype
            left_BNR, core_BRR = torch.linalg.qr(matrix_BNC.to(precision) @ right_BCR.to(precision))
            return left_BNR.double(), core_BRR.to(matrix_BNC.dtype), right_BCR
    left_BNC, values_BC, rows_BCC = torch.linalg.svd(matrix_BNC, full_matrices=False)
    directions_BR = _above_rounding(values_BC, values_BC.dtype)[:, :rank]
    return (
        (left_BNC[:, :, :rank] * directions_BR[:, None]).double(),
        torch.diag_embed(values_BC[:, :rank] * directions_BR),
        (rows_BCC[:, :rank].mT * directions_BR[:, None]).double(),
    )


def _leading_right(matrix_BNC: Tensor, rank: int) -> Tensor | None:
    """An orthonormal basis of the leading right singular directions, or None where the Gram matrix hides them."""
    gram_BCC = gram(matrix_BNC)
    values_BC, vectors_BCC = torch.linalg.eigh(gram_BCC)
    share_B = values_BC[:, -rank] / values_BC[:, -1]  # nan of a zero matrix
    if not bool((share_B > LEADING_CONDITION).all()):
        return None
    times_gram: Callable[[Tensor], Tensor]
    if bool((share_B > GRAM_CONDITION).all()):
        wide_BCC = gram_BCC.double()
        times_gram = wide_BCC.matmul
    else:
        wide_BNC = matrix_BNC.double()

        def times_gram(head_BCR: Tensor) -> Tensor:
            return wide_BNC.mT @ (wide_BNC @ head_BCR)

    smallest_B11 = torch.finfo(matrix_BNC.dtype).eps * values_BC[:, -1, None, None].double()
    values_BC, tail_BCT = values_BC.double(), vectors_BCC[:, :, :-rank]
    head_BCR: Tensor = vectors_BCC[:, :, -rank:].double()
    for _ in range(REFINEMENTS):
        image_BCR = times_gram(head_BCR)
        ritz_BR, turn_BRR = torch.linalg.eigh(head_BCR.mT @ image_BCR)
        head_BCR = head_BCR @ turn_BRR
        # The residual, not the image: bases from float32 are orthogonal to each other to 1e-6 only.
        residual_BCR = image_BCR @ turn_BRR - head_BCR * ritz_BR[:, None, :]
        gap_BTR = (ritz_BR[:, None, :] - values_BC[:, :-rank, None]).clamp_min(smallest_B11)
        # A small correction: its own products need no float64.
        rotation_BTR = tail_BCT.mT @ residual_BCR.to(tail_BCT.dtype) / gap_BTR
        head_BCR, _ = torch.linalg.qr(head_BCR + tail_BCT @ rotation_BTR.to(tail_BCT.dtype))
        if float(rotation_BTR.abs().max()) < SMALL_ROTATION:
            return head_BCR
        tail_BCT = tail_BCT - (head_BCR @ (head_BCR.mT @ tail_BCT.double())).to(tail_BCT.dtype)
    return None


def _ridged(gram_II: Tensor, ridge: Tensor) -> Tensor:
    matrix_II = gram_II.to(torch.float64, copy=True)
    matrix_II.diagonal().add_(ridge)
    return matrix_II


def _nearly_square(matrix_BNC: Tensor) -> bool:
    return matrix_BNC.shape[1] * 4 < matrix_BNC.shape[2] * 5


def _identity_like(matrix_BCC: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.eye(matrix_BCC.shape[1], dtype=dtype, device=matrix_BCC.device).expand(matrix_BCC.shape)


def _above_rounding(values_BC: Tensor, dtype: torch.dtype) -> Tensor:
    return values_BC > ROUNDING_EPS * torch.finfo(dtype).eps * values_BC[:, :1]
