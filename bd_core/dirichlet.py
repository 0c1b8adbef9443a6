"""Subjective-logic opinion of a Dirichlet, its inter-class ambiguity (IEC), and its distance from ignorance.

Shapes: N samples, C classes (the paper's L).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.checks import check_alpha


@dataclass(frozen=True, eq=False)
class Opinion:
    """What Dir(alpha) believes of each sample; belief.sum(1) + uncertainty = 1 and probability.sum(1) = 1."""

    belief: Float[Tensor, "N C"]
    uncertainty: Float[Tensor, " N"]
    probability: Float[Tensor, "N C"]


def opinion(alpha_NC: Float[Tensor, "N C"]) -> Opinion:
    """Belief, uncertainty and expected probability of every sample.

    b_c = (alpha_c - 1) / S, u = C / S, p_c = alpha_c / S with S = sum_c alpha_c (evidential deep learning).
    Beliefs are in [0, 1] where alpha >= 1; an alpha below 1 is allowed and gives a negative belief.

    Raises ValueError when alpha is empty, not finite, or not above 0.
    """
    check_alpha(alpha_NC, "opinion")
    strength_N1 = alpha_NC.sum(dim=1, keepdim=True)
    n_classes = alpha_NC.shape[1]
    return Opinion(
        belief=(alpha_NC - 1) / strength_N1,
        uncertainty=n_classes / strength_N1[:, 0],
        probability=alpha_NC / strength_N1,
    )


def iec(alpha_NC: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """Inter-class ambiguity nu of every sample: C for a uniform alpha = 1, towards 0 for a confident sample.

    BD-Merging, IEC: nu = (S / a1) (C / S) (a2 / a1), a1 >= a2 the two largest alphas, which is C a2 / a1^2.

    Raises ValueError when alpha is invalid (see `opinion`) or has fewer than two classes.
    """
    check_alpha(alpha_NC, "iec", min_classes=2)
    first_N, second_N = alpha_NC.topk(2, dim=1).values.unbind(dim=1)
    return alpha_NC.shape[1] * (second_N / first_N) / first_N  # dividing twice: a1^2 would overflow float32 first


def kl_to_uniform(alpha_NC: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """KL(Dir(alpha) || Dir(1)) of every sample in nats, never below 0, exactly 0 at alpha = 1.

    ln G(S) - ln G(C) - sum_c ln G(alpha_c) + sum_c (alpha_c - 1)(psi(alpha_c) - psi(S)), G the gamma function.
    The terms grow like S ln S and cancel, so the sum is made in float64 and given back in the input's dtype.

    Raises ValueError when alpha is invalid (see `opinion`).
    """
    check_alpha(alpha_NC, "kl_to_uniform")
    wide_NC = alpha_NC.double()
    strength_N = wide_NC.sum(dim=1)
    classes = strength_N.new_tensor(alpha_NC.shape[1])  # torch's lgamma on both sides, so that alpha = 1 cancels
    normaliser_N = torch.lgamma(strength_N) - torch.lgamma(classes) - torch.lgamma(wide_NC).sum(dim=1)
    surplus_NC = torch.digamma(wide_NC) - torch.digamma(strength_N)[:, None]
    divergence_N = normaliser_N + ((wide_NC - 1) * surplus_NC).sum(dim=1)
    return torch.relu(divergence_N).to(alpha_NC.dtype)  # relu: rounding may leave -1e-13 near alpha = 1
