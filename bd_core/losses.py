"""The terms of both training stages, each a scalar to minimise. No term reads a label.

Shapes: N samples, C classes, B batch, A anchors, M other samples of an anchor (its M+ and M-, padded), D width.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bd_core.checks import check_features, check_logits, check_option
from bd_core.dirichlet import iec, kl_to_uniform, opinion

InverseForm = Literal["gated", "pearson"]


def evidential_loss(alpha_NC: Float[Tensor, "N C"], kl_weight: float = 0.1) -> Float[Tensor, ""]:
    """L_Ent = mean over samples of H(p) + kl_weight KL(Dir(alpha) || Dir(1)), in nats.

    BD-Merging, stage 1; kl_weight is its lambda = 0.1. Taking the entropy of p = alpha / S is ours.
    """
    probability_NC = opinion(alpha_NC).probability
    entropy_N = torch.special.entr(probability_NC).sum(dim=1)
    return torch.mean(entropy_N + kl_weight * kl_to_uniform(alpha_NC))


def inverse_loss(alpha_NC: Float[Tensor, "N C"], form: InverseForm = "gated") -> Float[Tensor, ""]:
    """L_Inv, small where confident samples (low u) are not ambiguous (low nu).

    BD-Merging asks for "an inverse relationship" of u and nu and gives no formula; both forms are ours.
    `gated`: mean of (1 - u) nu / C. `pearson`: correlation of u and nu over the batch, 0 if one is constant.
    """
    check_option(form, ("gated", "pearson"), "form", "inverse_loss")
    uncertainty_N, ambiguity_N = opinion(alpha_NC).uncertainty, iec(alpha_NC)
    if form == "gated":
        return torch.mean((1 - uncertainty_N) * ambiguity_N / alpha_NC.shape[1])
    u_N, nu_N = uncertainty_N - uncertainty_N.mean(), ambiguity_N - ambiguity_N.mean()
    spread: Tensor = torch.linalg.vector_norm(u_N) * torch.linalg.vector_norm(nu_N)
    return (u_N * nu_N).sum() / spread.clamp_min(torch.finfo(alpha_NC.dtype).tiny)


def head_loss(
    alpha_NC: Float[Tensor, "N C"], kl_weight: float = 0.1, inverse_weight: float = 0.1, form: InverseForm = "gated"
) -> Float[Tensor, ""]:
    """L_Head = L_Ent + inverse_weight L_Inv (BD-Merging, stage 1; inverse_weight is its gamma = 0.1)."""
    return evidential_loss(alpha_NC, kl_weight) + inverse_weight * inverse_loss(alpha_NC, form)


def prediction_entropy(logits_BC: Float[Tensor, "B C"]) -> Float[Tensor, " B"]:
    """Shannon entropy of softmax(logits) of every sample, in nats; raises ValueError for empty or not finite logits."""
    check_logits(logits_BC, "prediction_entropy")
    log_p_BC = logits_BC.log_softmax(dim=1)
    return -(log_p_BC.exp() * log_p_BC).sum(dim=1)


def unsupervised_loss(logits_BC: Float[Tensor, "B C"]) -> Float[Tensor, ""]:
    """L_Unsup: mean entropy of the merged model's predictions with the samples' own task head (BD-Merging, stage 2)."""
    return prediction_entropy(logits_BC).mean()


def information_maximisation(logits_BC: Float[Tensor, "B C"]) -> Float[Tensor, ""]:
    """Minus the entropy of the mean prediction, in nats; minimising it spreads predictions over the classes (ours).

    Give it the logits of one task at a time: it counters the router's collapse towards the most confident expert.
    """
    check_logits(logits_BC, "information_maximisation")
    return -torch.sum(torch.special.entr(logits_BC.softmax(dim=1).mean(dim=0)))


def discrepancy_contrastive_loss(
    anchor_AD: Float[Tensor, "A D"],
    others_AMD: Float[Tensor, "A M D"],
    positive_AM: Bool[Tensor, "A M"],
    valid_AM: Bool[Tensor, "A M"],
    temperature: float = 0.1,
) -> tuple[Float[Tensor, ""], int]:
    """L_Dis and the number of anchors it was averaged over (those with a positive; 0 gives a loss of 0).

    BD-Merging pulls M+ together and pushes M- apart and gives no formula; ours is multi-positive InfoNCE,
    mean over k in M+ of -log(exp(s_k / T) / sum over M+ and M- of exp(s / T)), s the cosine with the anchor.
    Features are L2-normalised; entries with valid = False are padding, whose features are never read.

    Raises ValueError for features that are not, a positive that is padding, or a temperature not above 0.
    """
    place = "discrepancy_contrastive_loss"
    if not temperature > 0:
        raise ValueError(f"{place}: temperature = {temperature}, needs a value above 0; the default is 0.1")
    if (
        anchor_AD.ndim != 2
        or others_AMD.ndim != 3
        or not (
            (*others_AMD.shape[:2],) == positive_AM.shape == valid_AM.shape
            and anchor_AD.shape == (others_AMD.shape[0], others_AMD.shape[2])
        )
    ):
        shapes = [tuple(part.shape) for part in (anchor_AD, others_AMD, positive_AM, valid_AM)]
        raise ValueError(f"{place}: shapes are {shapes}, needs [A, D], [A, M, D], [A, M], [A, M]; pad others to one M")
    if (positive_AM & ~valid_AM).any():
        anchor, other = (int(i) for i in (positive_AM & ~valid_AM).nonzero()[0])
        raise ValueError(f"{place}: positive[{anchor}, {other}] is padding; a positive must also be valid")
    check_features(anchor_AD, f"{place}, anchors")
    if valid_AM.any():
        check_features(others_AMD[valid_AM], f"{place}, valid others")
    used_A = positive_AM.any(dim=1)
    n_used = int(used_A.sum())
    if n_used == 0:
        return anchor_AD.sum() * 0, 0  # still part of the graph, so that backward() works
    others_AMD = others_AMD.masked_fill(~valid_AM[:, :, None], 0)  # padding may hold nan, and nan times 0 is nan
    logits_AM = (torch.einsum("ad,amd->am", anchor_AD, others_AMD) / temperature)[used_A]
    total_A1 = logits_AM.masked_fill(~valid_AM[used_A], -torch.inf).logsumexp(dim=1, keepdim=True)
    positive_AM = positive_AM[used_A]
    loss_A = ((total_A1 - logits_AM) * positive_AM).sum(dim=1) / positive_AM.sum(dim=1)
    return loss_A.mean(), n_used
