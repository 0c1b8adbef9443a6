"""How far a merge of ours is from a peer's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from golden.read_golden import read_golden
from torch import Tensor

RELATIVE = 1e-5
ROUNDING = float(torch.finfo(torch.float32).eps)


def differences(merged: Mapping[str, Tensor], case: str, base: Mapping[str, Tensor]) -> dict[str, float]:
    """||ours - peer|| over ||peer - theta_0||, tensor by tensor: relative to the step, not to the weights.

    What one float32 rounding of the weights themselves makes is taken off: both sides store theta_0 + step.
    """
    found = {}
    for name, peer in read_golden(case).tensors.items():
        wide = peer.double()
        apart = float((merged[name].double() - wide).norm()) - ROUNDING * float(wide.norm())
        step = float((wide - base[name].double()).norm())
        found[name] = max(0.0, apart) / step if step > 0 else max(0.0, apart)
    return found


def assert_agrees(merged: Mapping[str, Tensor], case: str, base: Mapping[str, Tensor], most: float = RELATIVE) -> None:
    """Every tensor is within `most` of the peer's, relative to the step."""
    found = differences(merged, case, base)
    worst = max(found, key=lambda name: found[name])
    assert found[worst] <= most, (
        f"{case}: {worst} differs by {found[worst]:.1e} of the step; at most {most:g} is allowed"
    )
