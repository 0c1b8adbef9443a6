"""MAP: how every task's metric depends on the merging coefficients, learned from a few merges; the best trade-offs.

Legend: K experts, T metrics (one a task), S sampled merges, P candidate coefficients, Q terms of a quadratic in K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bd_core.methods.stream import Merged, StateDict, entrywise, merged_names, unmerged

__all__ = [
    "ParetoMap",
    "Surrogates",
    "fit_surrogates",
    "n_terms",
    "non_dominated",
    "pareto_map",
    "sample_coefficients",
    "search_at_random",
    "weighted_sum",
]

RANDOM_POINTS = 4096  # most of them are non-dominated when the tasks are many


@dataclass(frozen=True)
class Surrogates:
    """One quadratic a metric: M_t(c) = e_t + b_t c + c A_t c / 2, with A_t symmetric; fitted within [0, `upper`]^K.

    `r_squared` is the share of each metric's variance over the samples that its quadratic explains (1 for a metric
    that does not vary).
    """

    quadratic_TKK: Float[Tensor, "T K K"]
    linear_TK: Float[Tensor, "T K"]
    constant_T: Float[Tensor, " T"]
    r_squared_T: Float[Tensor, " T"]
    upper: float

    def predict(self, coefficients_PK: Float[Tensor, "P K"]) -> Float[Tensor, "P T"]:
        """The metrics expected of these coefficients; not held to the metrics' own range."""
        c_PK = coefficients_PK.to(self.linear_TK)
        curved_PT = torch.einsum("pk,tkj,pj->pt", c_PK, self.quadratic_TKK, c_PK) / 2
        return self.constant_T + c_PK @ self.linear_TK.T + curved_PT


Search = Callable[[Surrogates], Float[Tensor, "P K"]]


@dataclass(frozen=True)
class ParetoMap:
    """The chosen model, and what it was chosen from.

    `coefficients` [K] of `merged` and its measured `metrics` [T]; `front` [P, K] and `predicted` [P, T]: the trade-offs
    that no other candidate beats in every metric, as the surrogates see them.
    """

    merged: dict[str, Tensor]
    coefficients: Float[Tensor, " K"]
    metrics: Float[Tensor, " T"]
    front: Float[Tensor, "P K"]
    predicted: Float[Tensor, "P T"]
    surrogates: Surrogates


def pareto_map(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    validate: Callable[[dict[str, Tensor]], Tensor],
    search: Search | None = None,
    samples: int | None = None,
    upper: float = 1.0,
    preference: Sequence[float] | None = None,
    verified: int = 5,
    seed: int = 0,
) -> ParetoMap:
    """theta_0 + sum_k c_k tau_k with c from the Pareto front of the tasks' metrics, as quadratics in c predict them.

    `validate(state)` measures a merged model: one metric a task [T], larger is better. It is called for `samples`
    merges with c uniform in [0, `upper`]^K (default: twice the quadratics' (K + 1)(K + 2) / 2 terms, ours); `search`
    maps the surrogates to candidates [P, K], of which the non-dominated ones are the front. The front's `verified`
    best by the mean metric, weighted by `preference`, are merged and measured, too, and the best measured model of
    those and of the samples is the result (ours: a surrogate may promise what no model keeps).

    Source: Li et al., MAP, ICLR 2025. There, and where a search is passed in, NSGA-III looks for the front; the
    default takes uniform candidates. The released code fits the quadratic inside a sigmoid; plain least squares are
    the paper's formula. Cost: `samples` + `verified` merges and validations; one merged model beside in- and output.
    """
    check_settings(samples=samples, upper=upper, preference=preference, verified=verified)
    n_experts = len(experts)
    wanted = 2 * n_terms(n_experts) if samples is None else samples
    tried_SK = sample_coefficients(wanted, n_experts, seed=seed, upper=upper)

    def measured(c_K: Tensor) -> Tensor:
        return validate(dict(weighted_sum(base, experts, coefficients=c_K.tolist()))).detach().double().cpu()

    metrics_ST = torch.stack([measured(c_K) for c_K in tried_SK])
    weight_T = torch.ones(metrics_ST.shape[1]) if preference is None else torch.tensor(preference)
    if len(weight_T) != metrics_ST.shape[1]:
        raise ValueError(f"pareto_map: {len(weight_T)} preferences for {metrics_ST.shape[1]} metrics; give one each")
    weight_T = weight_T.double() / weight_T.sum()
    surrogates = fit_surrogates(tried_SK, metrics_ST, upper=upper)
    found_PK = (search or search_at_random)(surrogates).double()
    predicted_PT = surrogates.predict(found_PK)
    on_front_P = non_dominated(predicted_PT)
    front_PK, predicted_PT = found_PK[on_front_P], predicted_PT[on_front_P]
    best_PK = front_PK[(predicted_PT @ weight_T).argsort(descending=True, stable=True)[:verified]]
    all_PK = torch.cat((tried_SK, best_PK))
    metrics_PT = torch.cat((metrics_ST, *(measured(c_K)[None] for c_K in best_PK)))
    chosen = int((metrics_PT @ weight_T).argmax())
    merged = dict(weighted_sum(base, experts, coefficients=all_PK[chosen].tolist()))
    return ParetoMap(
        {name: merged[name] for name in base}, all_PK[chosen], metrics_PT[chosen], front_PK, predicted_PT, surrogates
    )


def check_settings(
    *,
    samples: int | None = None,
    upper: float = 1.0,
    preference: Sequence[float] | None = None,
    verified: int = 5,
    **_: object,
) -> None:
    """`ValueError` when `pareto_map` would refuse these; costs nothing, so that a configuration can be checked."""
    if samples is not None and samples < 1:
        raise ValueError(f"pareto_map: samples={samples} must be at least 1")
    if not (upper > 0 and math.isfinite(upper)):
        raise ValueError(f"pareto_map: upper={upper} must be above 0 and finite")
    if verified < 0:
        raise ValueError(f"pareto_map: verified={verified} must not be negative")
    if preference is not None and not (all(weight >= 0 for weight in preference) and sum(preference) > 0):
        raise ValueError(f"pareto_map: preference={list(preference)} must be weights of 0 or more, not all 0")


def weighted_sum(base: StateDict, experts: Sequence[StateDict], *, coefficients: Sequence[float]) -> Merged:
    """theta_0 + sum_k c_k tau_k, tensor by tensor: Task Arithmetic with a coefficient of its own for each expert."""
    if len(coefficients) != len(experts):
        raise ValueError(f"weighted_sum: {len(coefficients)} coefficients for {len(experts)} experts; give one each")
    if not all(math.isfinite(c) for c in coefficients):
        raise ValueError(f"weighted_sum: coefficients={list(coefficients)} must be finite")
    c_K = torch.tensor(list(coefficients), dtype=torch.float64)

    def step(vectors_Kn: Tensor, name: str, start: int) -> Tensor:
        return c_K.to(vectors_Kn) @ vectors_Kn

    def stream() -> Merged:
        yield from entrywise(base, experts, merged_names(base), step)
        yield from unmerged(base, experts)

    return stream()


def sample_coefficients(n_samples: int, n_experts: int, *, seed: int, upper: float = 1.0) -> Float[Tensor, "S K"]:
    """Merging coefficients drawn uniformly from [0, upper]^K, in float64; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return upper * torch.rand(n_samples, n_experts, generator=generator, dtype=torch.float64)


def n_terms(n_experts: int) -> int:
    """(K + 1)(K + 2) / 2: the terms of a quadratic in K variables, and the fewest samples that determine one."""
    return (n_experts + 1) * (n_experts + 2) // 2


def fit_surrogates(
    coefficients_SK: Float[Tensor, "S K"], metrics_ST: Float[Tensor, "S T"], *, upper: float = 1.0
) -> Surrogates:
    """The quadratics with the least squared error over the samples, in float64.

    Raises ValueError for fewer samples than terms, samples that leave the quadratic open, and what is not finite.
    """
    c_SK, m_ST = coefficients_SK.detach().double(), metrics_ST.detach().double()
    n_samples, n_experts = c_SK.shape
    if n_samples < n_terms(n_experts):
        raise ValueError(
            f"fit_surrogates: {n_samples} samples leave the {n_terms(n_experts)} terms of a quadratic in {n_experts} "
            "coefficients open; sample more merges"
        )
    for what, given in (("coefficients", c_SK), ("metrics", m_ST)):
        if not bool(torch.isfinite(given).all()):
            row = int((~torch.isfinite(given).all(1)).nonzero()[0])
            raise ValueError(f"fit_surrogates: the {what} of sample {row} are not finite; leave that sample out")
    i_P, j_P = torch.triu_indices(n_experts, n_experts, device=c_SK.device)
    terms_SQ = torch.cat((torch.ones_like(c_SK[:, :1]), c_SK, c_SK[:, i_P] * c_SK[:, j_P]), dim=1)
    if int(torch.linalg.matrix_rank(terms_SQ)) < terms_SQ.shape[1]:
        raise ValueError("fit_surrogates: the sampled coefficients lie on one quadratic; vary them more")
    found_QT = torch.linalg.lstsq(terms_SQ, m_ST).solution
    half_TKK = c_SK.new_zeros(m_ST.shape[1], n_experts, n_experts)
    half_TKK[:, i_P, j_P] = found_QT[1 + n_experts :].T
    residual_T = (m_ST - terms_SQ @ found_QT).square().sum(0)
    spread_T = (m_ST - m_ST.mean(0)).square().sum(0)
    varies_T = spread_T > 1e-24 * n_samples
    r_squared_T = torch.where(varies_T, 1 - residual_T / torch.where(varies_T, spread_T, 1.0), 1.0)
    return Surrogates(half_TKK + half_TKK.mT, found_QT[1 : 1 + n_experts].T, found_QT[0], r_squared_T, upper)


def non_dominated(metrics_PT: Float[Tensor, "P T"]) -> Bool[Tensor, " P"]:
    """Whether no other point is at least as good in every metric and better in one; larger is better.

    Points equal to a non-dominated one are kept. Time P^2 T, memory P T.
    """
    kept_P = torch.ones(len(metrics_PT), dtype=torch.bool, device=metrics_PT.device)
    for p in metrics_PT.sum(1).argsort(descending=True).tolist():
        if kept_P[p]:
            point_T = metrics_PT[p]
            kept_P &= ~((metrics_PT <= point_T).all(1) & (metrics_PT < point_T).any(1))
    return kept_P


def search_at_random(surrogates: Surrogates) -> Float[Tensor, "P K"]:
    """Candidates where no search is given: RANDOM_POINTS uniform coefficients of the box the surrogates know."""
    return sample_coefficients(RANDOM_POINTS, surrogates.linear_TK.shape[1], seed=0, upper=surrogates.upper)
