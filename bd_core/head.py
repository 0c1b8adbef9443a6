"""The evidential head: one linear map from a unit feature to a Dirichlet over the unified label space.

Shapes: N samples, C classes, D width.

How much evidence a cosine is worth decides everything downstream (the sign of the sharpness, u, the pairs), so a head
is calibrated on data before it is used: softplus of raw CLIP logits (18 to 30) over hundreds of classes is flat.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bd_core.checks import check_features, check_option
from bd_core.dirichlet import opinion
from bd_core.label_space import LabelSpace, unify_heads

# Where `calibrate` may put the offset, between the mean cosine (0) and the mean largest cosine of a sample (1). A low
# place lets more classes have evidence; softplus over many classes needs a high one to be confident at all.
OFFSET_POSITIONS = (0.5, 0.75, 1.0)


Activation = Literal["softplus", "exp"]


@dataclass(frozen=True)
class Calibration:
    """What `EvidentialHead.calibrate` chose, and the mean p_max and u it leads to."""

    scale: float
    offset: float
    mean_confidence: float
    mean_uncertainty: float


class EvidentialHead(nn.Module):
    """alpha = 1 + activation(scale (feature . weight - offset)), one Dirichlet a sample.

    The paper states neither the activation nor the initialisation; both are ours: softplus or exp, and the weight is
    the stacked zero-shot (or supplied) class heads, since a random head trained without labels collapses to one class.
    The weight and the offset are trained, the scale is not. Logits are clamped so that the evidence is at most
    exp(max_logit) with either activation. p is largest at the zero-shot class until the head is trained.
    """

    scale: Tensor

    def __init__(
        self,
        weight_CD: Float[Tensor, "C D"],
        *,
        activation: Activation = "softplus",
        scale: float = 1.0,
        offset: float = 0.0,
        max_logit: float = 20.0,
    ) -> None:
        super().__init__()
        check_option(activation, ("softplus", "exp"), "activation", "EvidentialHead")
        if weight_CD.ndim != 2 or weight_CD.shape[0] < 2 or not torch.isfinite(weight_CD).all():
            raise ValueError(
                f"EvidentialHead: the weight has shape {tuple(weight_CD.shape)} or nan/inf, needs finite [C >= 2, D]; "
                "build it with unify_heads"
            )
        if not (0 < scale < math.inf and math.isfinite(offset) and 0 < max_logit <= 30):
            raise ValueError(
                f"EvidentialHead: scale = {scale}, offset = {offset}, max_logit = {max_logit}; needs a finite scale "
                "above 0, a finite offset and max_logit in (0, 30] (float32 must hold its exp)"
            )
        self.activation = activation
        self.max_logit = max_logit
        self.weight = nn.Parameter(weight_CD.detach().clone())
        self.offset = nn.Parameter(weight_CD.new_tensor(offset))
        self.register_buffer("scale", weight_CD.new_tensor(scale))

    @classmethod
    def from_class_heads(
        cls,
        heads: Mapping[str, Tensor],
        space: LabelSpace,
        *,
        activation: Activation = "softplus",
        max_logit: float = 20.0,
    ) -> "EvidentialHead":
        """A head over the unified space, one unit row a class (see `unify_heads`); call `calibrate` next."""
        return cls(unify_heads(heads, space), activation=activation, max_logit=max_logit)

    def forward(self, features_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """alpha of every sample, at least 1; features must be L2-normalised.

        Raises ValueError when features are empty, not finite, not of unit length, or of another width.
        """
        return self._alpha(self._similarity(features_ND, "EvidentialHead"), self.scale, self.offset)

    @torch.no_grad()
    def calibrate(
        self, features_ND: Float[Tensor, "N D"], *, target_confidence: float, tolerance: float = 1e-3
    ) -> Calibration:
        """The offset and scale, now set in the head, at which the mean of max_c p_c is target_confidence (ours).

        For each of OFFSET_POSITIONS the scale follows by bisection: at scale 0 every p_c is 1/C, at the largest one the
        top logit reaches the clamp. The smallest scale wins: it keeps samples graded, where a steep one leaves them
        either no evidence or all of it. Memory: N x C in float64.

        Raises ValueError when the target is not in (1/C, 1) or no offset reaches it, and for features as `forward`.
        """
        n_classes = len(self.weight)
        if not 1 / n_classes < target_confidence < 1:
            raise ValueError(
                f"calibrate: target_confidence = {target_confidence}, needs a value between 1/C = {1 / n_classes:.4g} "
                "and 1; choose one that the classes allow"
            )
        similarity_NC = self._similarity(features_ND, "calibrate").double()  # bisection must not stop at float32 steps
        mean, mean_top = similarity_NC.mean(), similarity_NC.amax(dim=1).mean()
        reached, found = [], []
        for position in OFFSET_POSITIONS:
            offset = torch.lerp(mean, mean_top, position)
            spread = similarity_NC.max() - offset
            if spread <= 0:  # every cosine is the same: no scale makes a difference
                continue
            high = self._ceiling() / spread
            reached.append(self._confidence(similarity_NC, high, offset))
            if reached[-1] >= target_confidence:
                scale = self._bisect(similarity_NC, high, offset, target_confidence, tolerance)
                found.append((scale, offset))
        if found:
            return self._set(similarity_NC, *min(found, key=lambda pair: pair[0].item()))
        raise ValueError(
            f"calibrate: target_confidence = {target_confidence} cannot be reached over {n_classes} classes with "
            f"{self.activation} (at most {max(reached, default=1 / n_classes):.4g}); lower it, use activation='exp', "
            "raise max_logit, or check that features and class heads belong to one backbone"
        )

    def _similarity(self, features_ND: Tensor, place: str) -> Tensor:
        check_features(features_ND, place)
        if features_ND.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"{place}: features are {features_ND.shape[1]} wide, the head is {self.weight.shape[1]} wide; "
                "use features and class heads of one backbone"
            )
        return features_ND @ self.weight.T

    def _ceiling(self) -> float:
        return self.max_logit if self.activation == "exp" else math.exp(self.max_logit)

    def _alpha(self, similarity_NC: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        logit_NC = (scale * (similarity_NC - offset)).clamp(max=self._ceiling())
        return 1 + (logit_NC.exp() if self.activation == "exp" else nn.functional.softplus(logit_NC))

    def _confidence(self, similarity_NC: Tensor, scale: Tensor, offset: Tensor) -> float:
        return opinion(self._alpha(similarity_NC, scale, offset)).probability.amax(dim=1).mean().item()

    def _bisect(self, similarity_NC: Tensor, high: Tensor, offset: Tensor, target: float, tolerance: float) -> Tensor:
        # In log(scale), of which the confidence is a continuous function; at 1e-15 of the largest it is flat, 1/C.
        low = high * 1e-15
        for _ in range(100):
            middle = (low * high).sqrt()
            confidence = self._confidence(similarity_NC, middle, offset)
            if abs(confidence - target) <= tolerance / 10:
                break
            low, high = (middle, high) if confidence < target else (low, middle)
        return middle

    def _set(self, similarity_NC: Tensor, scale: Tensor, offset: Tensor) -> Calibration:
        self.scale.copy_(scale)
        self.offset.copy_(offset)
        mean_uncertainty = opinion(self._alpha(similarity_NC, scale, offset)).uncertainty.mean().item()
        confidence = self._confidence(similarity_NC, scale, offset)
        return Calibration(self.scale.item(), self.offset.item(), confidence, mean_uncertainty)
