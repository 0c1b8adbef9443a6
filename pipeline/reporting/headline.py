"""What won, by how much, and how sure that is: the sentences at the head of the report."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.reporting.predictions import Predictions, paired_difference
from pipeline.reporting.results import CLEAN, PROTOCOLS, ModelResult, Results, best_of


@dataclass(frozen=True)
class Verdict:
    """One protocol's outcome on the corrupted mean. `margin` and `margin_se` are shares, ours minus the rival's."""

    protocol: str
    winner: ModelResult
    ours: ModelResult | None
    rival: ModelResult | None
    margin: float | None
    margin_se: float | None
    n_images: int

    @property
    def certain(self) -> bool | None:
        """Whether the margin exceeds two standard errors; None without per-image predictions."""
        if self.margin is None or self.margin_se is None:
            return None
        return abs(self.margin) > 2 * self.margin_se


def verdict(results: Results, predictions: Mapping[str, Predictions], protocol: str) -> Verdict | None:
    """Best form of BD-Merging against the best other method, by mean accuracy over the corrupted levels.

    Without a form of ours, or without a rival, the two best methods are compared. None without any result.
    """
    contenders = [model for model in results.contenders if model.corrupted(protocol) is not None]
    winner = best_of(contenders, protocol, None)
    if winner is None:
        return None
    ours = best_of([model for model in contenders if model.ours], protocol, None)
    others = [model for model in contenders if not model.ours]
    left = ours if ours is not None and others else winner
    rival = best_of(others if left.ours else [m for m in contenders if m is not left], protocol, None)
    if rival is None:
        return Verdict(protocol, winner, ours, None, None, None, 0)
    a, b = left.corrupted(protocol), rival.corrupted(protocol)
    assert a is not None and b is not None
    paired = paired_difference(predictions.get(protocol, {}), left.name, rival.name)
    return Verdict(
        protocol, winner, ours, rival, a - b, paired.standard_error if paired else None, paired.n if paired else 0
    )


def headline(outcome: Verdict, corruptions: str) -> str:
    """One sentence: what won under corruption, and by how much."""
    left = outcome.ours if outcome.ours is not None and outcome.rival is not None else outcome.winner
    value = left.corrupted(outcome.protocol)
    assert value is not None
    where = f"mean of {corruptions}, {PROTOCOLS[outcome.protocol]}"
    if outcome.rival is None or outcome.margin is None:
        return f"{left.title} reaches {percent(value)} % under corruption ({where}); there is nothing to compare with."
    points = f"{100 * abs(outcome.margin):.1f} points"
    if round(outcome.margin, 6) == 0:
        return f"{left.title} and {outcome.rival.title} tie at {percent(value)} % under corruption ({where})."
    if outcome.margin > 0:
        return f"{left.title} leads {outcome.rival.title} by {points} under corruption: {percent(value)} % ({where})."
    return f"{left.title} trails {outcome.rival.title} by {points} under corruption: {percent(value)} % ({where})."


def certainty(outcome: Verdict) -> str:
    """How far to trust the margin, in a sentence."""
    if outcome.margin is None:
        return ""
    if outcome.margin_se is None:
        return "No per-image predictions with labels were found, so the margin comes without an error bar."
    spread = (
        f"{100 * outcome.margin_se:.1f} points (standard error of the paired difference over {outcome.n_images:,} "
        "images; what another training seed would change is not in it)"
    )
    if outcome.certain:
        return (
            f"The margin is {abs(outcome.margin) / max(outcome.margin_se, 1e-9):.1f} standard errors wide: ± {spread}."
        )
    return f"That is within the noise of this test set, ± {spread}: a tie, until more seeds or images say otherwise."


def asides(results: Results, protocol: str) -> list[str]:
    """Plain sentences that keep the headline honest: clean accuracy, the bounds, and a method that fails them."""
    said = []
    clean = best_of(results.contenders, protocol, CLEAN)
    shifted = best_of(results.contenders, protocol, None)
    if clean is not None:
        value = clean.mean(protocol, CLEAN)
        assert value is not None
        also = " too" if clean is shifted else ""
        said.append(f"On clean images {clean.title} is ahead{also}, at {percent(value)} %.")
    pretrained, experts = results.get("pretrained"), results.get("experts")
    bounds = [
        f"{label} {percent(value)} %"
        for label, model in (("the pretrained model alone", pretrained), ("the individual experts", experts))
        if model is not None and (value := model.corrupted(protocol)) is not None
    ]
    if bounds:
        said.append(f"For reference, under the same corruption: {', '.join(bounds)}.")
    floor = pretrained.corrupted(protocol) if pretrained is not None else None
    if floor is not None:
        below = [m.title for m in results.contenders if (v := m.corrupted(protocol)) is not None and v < floor]
        if below:
            said.append(f"Below the pretrained model: {', '.join(below)}.")
    return said


def percent(share: float | None, digits: int = 1) -> str:
    """`61.2` for 0.612; an en dash where there is nothing."""
    return "–" if share is None or share != share else f"{100 * share:.{digits}f}"


def signed(share: float | None, digits: int = 1) -> str:
    """`−7.3` for −0.073, with a true minus sign."""
    return "–" if share is None or share != share else f"{100 * share:+.{digits}f}".replace("-", "−")
