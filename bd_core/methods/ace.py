"""ACE-Merging: input covariances estimated from the task vectors themselves, no data.

Legend: B layers of equal shape, K experts, O output rows, I input columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.methods.matrices import LAYER_BYTES, add_gram, by_layers, expert_layers
from bd_core.methods.stream import EMBEDDINGS, Merged, StateDict, matrix_names

__all__ = ["EPSILON", "ace"]

Variant = Literal["paper", "released"]
EPSILON = {"paper": 1e-5, "released": 1e-2}
# A result this many times larger than all task vectors together was made by the inverse, not by the experts (ours).
MAX_GROWTH = 10.0


@dataclass(frozen=True)
class _Settings:
    variant: Variant
    epsilon: float
    gate: float
    rank_share: float


def ace(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    variant: Variant = "released",
    epsilon: float | None = None,
    gate: float = 0.3,
    rank_share: float = 0.3,
    exclude: Sequence[str] = EMBEDDINGS,
    budget_bytes: int = LAYER_BYTES,
) -> Merged:
    """(sum_k W_k C_k) (sum_k C_k + C_agg)^-1 per matrix, C_k the covariance that the task vector D_k betrays.

    S_k = Dc_k^T Dc_k with Dc_k = D_k - 1 mu_k^T, mu_k the mean over output rows. Where the experts' sizes are mixed,
    gamma = Var_k[log |D_k|^2] / (mean_k log |D_k|^2)^2 > `gate`: S_k and epsilon are divided by tr S_k. C_k = S_k +
    epsilon I; every row of C_agg is the mean of the rows of sum_k S_k. Under the gate the result R then gets
    mean(s) U V^T of the first floor(`rank_share` rank) singular triplets of R + sum_k W_k (S_k - mean S).

    variant="paper": W_k = theta_k, and R replaces the weight; `epsilon` 1e-5 (theirs for ViT; 2e-4 RoBERTa-base, 4e-2
    GPT-2). variant="released", as their code: W_k = Dc_k, the centred task vector, mu_k is never added back, R is
    added to theta_0, `epsilon` 1e-2. Only the second leaves a matrix alone that no expert changed much: the paper's
    C_agg also takes from theta_0 itself, and its refinement then adds singular vectors of whole weights.

    Source: ACE-Merging, arXiv 2603.02945; `gate` and `rank_share` 0.3 theirs. Ours: variances over all K (not K - 1),
    zero task vectors count neither in gamma nor under the gate, rank is that of rounding. No matrix: mean of D_k.
    LoRA experts that share a factor have covariances of its rank: epsilon alone makes them regular. Where the inverse
    is still what speaks, the step over 10 times all task vectors together, a ValueError names the matrix.
    Cost: a Gram matrix of the stacked task vectors and one LU solve a matrix, an SVD more under the gate; experts are
    read twice; one [I, I] matrix and four to eight buffers of the layers' size in float64, however many experts.
    """
    if variant not in EPSILON:
        raise ValueError(f"ace: variant={variant!r} must be one of {', '.join(EPSILON)}")
    settings = _Settings(variant, EPSILON[variant] if epsilon is None else epsilon, gate, rank_share)
    if not 0 < settings.epsilon < float("inf"):
        raise ValueError(f"ace: epsilon={epsilon} must be above 0; without it the covariances cannot be inverted")
    if not gate >= 0:
        raise ValueError(f"ace: gate={gate} must not be negative; inf never opens it")
    if not 0 < rank_share <= 1:
        raise ValueError(f"ace: rank_share={rank_share} must lie in (0, 1]")

    def merge() -> Merged:
        def steps(names: list[str]) -> Tensor:
            return _steps(base, experts, names, settings)

        yield from by_layers(base, experts, matrix_names(base, exclude), budget_bytes, steps)

    return merge()


def _steps(
    base: StateDict, experts: Sequence[StateDict], names: Sequence[str], settings: _Settings
) -> Float[Tensor, "B O I"]:
    """Merged weight minus theta_0, of these layers."""
    norms_KB = torch.stack(
        [torch.linalg.vector_norm(vectors, dim=(1, 2)).double() for vectors in expert_layers(base, experts, names)]
    )
    gated_B = _heterogeneity(norms_KB) > settings.gate
    any_gated, paper = bool(gated_B.any()), settings.variant == "paper"
    # In float64 throughout: epsilon is small beside the covariances, and what it divides must not be their rounding.
    n_rows, n_columns = base[names[0]].shape
    system_BII = norms_KB.new_zeros((len(names), n_columns, n_columns))
    product_BOI = norms_KB.new_zeros((len(names), n_rows, n_columns))
    # What epsilon adds stays apart only where the refinement wants the product without it.
    lifted_BOI = torch.zeros_like(product_BOI) if any_gated else product_BOI
    sum_BOI = torch.zeros_like(product_BOI) if any_gated else product_BOI
    ridge_B = torch.zeros_like(norms_KB[0])
    centred_BOI = torch.empty_like(product_BOI)  # one for all experts
    weight_BOI = torch.empty_like(product_BOI) if paper else centred_BOI
    for vectors_BOI in expert_layers(base, experts, names):
        centred_BOI.copy_(vectors_BOI)
        if paper:
            _add_origin(weight_BOI.copy_(centred_BOI), base, names)
        centred_BOI -= centred_BOI.mean(1, keepdim=True)
        trace_B = torch.linalg.vector_norm(centred_BOI, dim=(1, 2)).square()
        # Under the gate all is per unit of trace: an expert without a trace has no say there.
        scale_B = torch.where(gated_B, torch.where(trace_B > 0, 1 / trace_B, 0.0), 1.0)
        ridge_B += settings.epsilon * scale_B
        if any_gated:
            sum_BOI += weight_BOI
        lifted_BOI.addcmul_(weight_BOI, (settings.epsilon * scale_B)[:, None, None])
        scaled_BOI = centred_BOI * scale_B.sqrt()[:, None, None] if any_gated else centred_BOI
        add_gram(system_BII, product_BOI, weight_BOI, scaled_BOI)
    # sum_k W_k (S_k - mean S), before the prior joins the covariances.
    residual_BOI = product_BOI - sum_BOI @ system_BII / len(experts) if any_gated else product_BOI
    system_BII += system_BII.mean(1, keepdim=True)
    system_BII.diagonal(dim1=1, dim2=2).add_(ridge_B[:, None])
    if any_gated:
        product_BOI += lifted_BOI
    solved_BOI = _solved(system_BII, product_BOI)
    for b in torch.nonzero(gated_B).flatten().tolist():
        solved_BOI[b] += _isotropic(residual_BOI[b] + solved_BOI[b], settings.rank_share)
    reach_B = norms_KB.sum(0)
    if paper:
        _add_origin(solved_BOI, base, names, alpha=-1)
        reach_B = reach_B + torch.stack([torch.linalg.vector_norm(base[name], dtype=torch.float64) for name in names])
    _check_growth(names, torch.linalg.vector_norm(solved_BOI, dim=(1, 2)), reach_B, settings)
    return solved_BOI


def _add_origin(result_BOI: Float[Tensor, "B O I"], base: StateDict, names: Sequence[str], alpha: int = 1) -> None:
    for row_OI, name in zip(result_BOI, names, strict=True):
        row_OI.add_(base[name].detach(), alpha=alpha)


def _solved(system_BII: Float[Tensor, "B I I"], product_BOI: Float[Tensor, "B O I"]) -> Float[Tensor, "B O I"]:
    """product system^-1 by LU; both are overwritten, for the system may be larger than all else."""
    failed = torch.zeros((), dtype=torch.int32, device=system_BII.device)
    pivots_I = failed.new_empty(0)
    # One by one: of several matrices, torch 2.13 with MKL takes the LU in threads that overwrite each other's pivots.
    for system_II, product_OI in zip(system_BII, product_BOI, strict=True):
        factors_II = system_II.mT  # X A = P is A^T X^T = P^T, with columns as LAPACK wants them
        torch.linalg.lu_factor_ex(factors_II, out=(factors_II, pivots_I, failed))
        product_OI.copy_(torch.linalg.lu_solve(factors_II, pivots_I, product_OI.mT).mT)
    return product_BOI


def _heterogeneity(norms_KB: Float[Tensor, "K B"]) -> Float[Tensor, " B"]:
    """gamma = Var_k[log |D_k|^2] / (mean_k log |D_k|^2)^2 over the experts that changed the matrix; 0 without any."""
    logs_KB = norms_KB.square().log()
    used_KB = norms_KB > 0
    logs_KB = torch.where(used_KB, logs_KB, 0.0)
    count_B = used_KB.sum(0).clamp_min(1)
    mean_B = logs_KB.sum(0) / count_B
    variance_B = (torch.where(used_KB, logs_KB - mean_B, 0.0).square().sum(0)) / count_B
    return torch.where(variance_B > 0, variance_B / mean_B.square(), 0.0)


def _isotropic(matrix_OI: Float[Tensor, "O I"], rank_share: float) -> Float[Tensor, "O I"]:
    """mean(s) U V^T over the first floor(rank_share * rank) singular triplets."""
    left_OC, values_C, right_CI = torch.linalg.svd(matrix_OI, full_matrices=False)
    rank = int((values_C > max(matrix_OI.shape) * torch.finfo(values_C.dtype).eps * values_C[0]).sum())
    count = int(rank_share * rank)
    if count == 0:
        return torch.zeros_like(matrix_OI)
    isotropic_OI: Tensor = values_C[:count].mean() * (left_OC[:, :count] @ right_CI[:count])
    return isotropic_OI


def _check_growth(names: Sequence[str], size_B: Tensor, reach_B: Tensor, settings: _Settings) -> None:
    for name, size, reach in zip(names, size_B.tolist(), reach_B.tolist(), strict=True):
        if not size <= MAX_GROWTH * reach:
            raise ValueError(
                f"ace: {name}: the merged step has norm {size:.3g}, all task vectors together {reach:.3g}; their "
                f"covariances are close to singular (experts that share a factor?). Raise epsilon={settings.epsilon:g} "
                "or leave the matrix out by `exclude`"
            )
