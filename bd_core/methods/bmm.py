"""Bayesian Model Merging: Bayesian linear regression on activations, under a prior centred on another merge.

Legend: K experts, O output rows, I input columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.methods.averages import task_arithmetic, weight_average
from bd_core.methods.matrices import expert_layers, right_solve
from bd_core.methods.regmean import check_grams, gram_of
from bd_core.methods.stream import EMBEDDINGS, Merged, StateDict, finish, matrix_names
from bd_core.methods.tsv_m import tsv_m
from bd_core.methods.wudi import wudi_exact
from bd_core.task_vectors import check_layout, widened

__all__ = ["ANCHORS", "LOG10_LAMBDA", "PreparedBmm", "bmm", "module_groups", "prepare_bmm"]

ANCHORS: dict[str, Callable[[StateDict, Sequence[StateDict]], Merged]] = {
    "task_arithmetic": task_arithmetic,
    "wudi_exact": wudi_exact,
    "tsv_m": tsv_m,
    "weight_average": weight_average,
}
LOG10_LAMBDA = (-4.0, 2.0)  # the range the paper searches
DEFAULT_LOG10_LAMBDA = -1.0  # its middle (ours, where nothing is searched)
Setting = float | Mapping[str, float]

KINDS = (
    ("attention", re.compile(r"attn|attention", re.I)),
    ("mlp", re.compile(r"mlp|ffn|fc|dense|intermediate", re.I)),
)
DEPTHS = ("early", "middle", "late")


def bmm(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    grams: Mapping[str, Tensor] | None = None,
    anchor: str = "task_arithmetic",
    log10_lambda: Setting = DEFAULT_LOG10_LAMBDA,
    scale: Setting = 1.0,
    exclude: Sequence[str] = EMBEDDINGS,
) -> Merged:
    """W_0 + s (W* - W_0) with W* = W_a + sum_k (W_k - W_a) G_k (sum_k G_k + lambda I)^-1, matrix by matrix.

    W_a is the `anchor`: a merge by its method's name, with that method's defaults. Calibrated: `grams[name]` [K, I, I],
    G_k = X_k^T X_k / n_k. Data-free (`grams=None`): G_k = tau_k^T tau_k / |tau_k|^2. As lambda goes to 0 this is
    RegMean with nothing shrunk, as it grows the anchor. Everything without Gram matrices, and directions that no input
    uses (ours): the anchor's. `log10_lambda` and `scale` (s) are one number, or one a group of `module_groups`; groups
    left out take the default.

    Source: Bayesian Model Merging, arXiv 2605.12843; the inner level in our reading of its abstract, lambda and s
    searched there over a small validation set. For such a search see `prepare_bmm`, whose result merges anew cheaply.
    Cost: the anchor's, K products [O, I] [I, I] and a Cholesky solve in float64 a matrix; one matrix at a time.
    Raises ValueError for an unknown anchor, group, or value, and for Gram matrices that do not fit.
    """
    check_anchor(anchor)
    _check_setting("log10_lambda", log10_lambda)
    _check_setting("scale", scale)

    def merge() -> Merged:
        groups = module_groups(_regressed(base, grams, exclude))
        lambda_of = _by_name("log10_lambda", log10_lambda, DEFAULT_LOG10_LAMBDA, groups)
        scale_of = _by_name("scale", scale, 1.0, groups)
        for name, anchored in ANCHORS[anchor](base, experts):
            if name not in groups:
                yield name, anchored
                continue
            anchor_OI, total_II, pull_OI = _statistics(base, experts, name, anchored, grams)
            moved_OI = anchor_OI + right_solve(pull_OI[None], total_II[None], 10.0 ** lambda_of[name])[0]
            yield name, finish(base[name], scale_of[name] * moved_OI)

    return merge()


def module_groups(names: Iterable[str]) -> dict[str, str]:
    """The group of every matrix: attention, mlp or other, and early, middle or late in its row of blocks (ours).

    Names without a block's number belong to the group of their kind alone. At most nine groups and three more.
    """
    ordered = list(names)
    places = {name: place for name in ordered if (place := re.match(r"(.*?)\.?\b(\d+)\.", name))}
    depth: dict[str, int] = {}
    for place in places.values():
        depth[place[1]] = max(depth.get(place[1], 0), 1 + int(place[2]))
    groups = {}
    for name in ordered:
        groups[name] = next((kind for kind, pattern in KINDS if pattern.search(name)), "other")
        if name in places:
            row, number = places[name][1], int(places[name][2])
            groups[name] += f" {DEPTHS[len(DEPTHS) * number // depth[row]]}"
    return groups


def check_anchor(anchor: str) -> None:
    """Nothing; ValueError unless `bmm` takes an anchor of this name."""
    if anchor not in ANCHORS:
        raise ValueError(f"bmm: anchor={anchor!r} must be one of {', '.join(ANCHORS)}")


@dataclass(frozen=True)
class _Layer:
    """One matrix, ready for any lambda: sum_k G_k = Q diag(values) Q^T, and the experts' pull in that basis."""

    anchor_OI: Tensor  # W_a - W_0
    pull_OI: Tensor  # sum_k (W_k - W_a) G_k Q
    basis_II: Tensor  # Q
    values_I: Tensor


@dataclass(frozen=True)
class PreparedBmm:
    """All of BMM that no setting changes: `merge` is then one product [O, I] [I, I] a matrix.

    `groups` has the group of every matrix, by `module_groups`. Holds two models and an [I, I] basis a matrix.
    """

    base: StateDict
    anchored: dict[str, Tensor]
    layers: dict[str, _Layer]
    groups: dict[str, str]

    def merge(self, log10_lambda: Setting = DEFAULT_LOG10_LAMBDA, scale: Setting = 1.0) -> dict[str, Tensor]:
        """The merged state dict, every tensor a new one; errors as in `bmm`."""
        lambda_of = _by_name("log10_lambda", log10_lambda, DEFAULT_LOG10_LAMBDA, self.groups)
        scale_of = _by_name("scale", scale, 1.0, self.groups)
        merged = {}
        for name in self.base:
            if name not in self.layers:
                merged[name] = self.anchored[name].clone()
                continue
            layer = self.layers[name]
            damped_I = layer.values_I + 10.0 ** lambda_of[name]
            inverse_I = torch.where(damped_I > _rounding(layer.values_I), 1 / damped_I, 0.0)
            moved_OI = torch.addmm(layer.anchor_OI, layer.pull_OI * inverse_I, layer.basis_II.mT)
            merged[name] = finish(self.base[name], scale_of[name] * moved_OI)
        return merged


def prepare_bmm(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    grams: Mapping[str, Tensor] | None = None,
    anchor: str = "task_arithmetic",
    exclude: Sequence[str] = EMBEDDINGS,
) -> PreparedBmm:
    """What `bmm` computes before lambda and s matter; arguments, source and errors as there.

    Cost: as `bmm`, with an eigendecomposition of size I in float64 a matrix instead of the solve.
    """
    check_anchor(anchor)
    check_layout(base, experts)
    groups = module_groups(_regressed(base, grams, exclude))
    anchored, layers = {}, {}
    for name, tensor in ANCHORS[anchor](base, experts):
        if name not in groups:
            anchored[name] = tensor
            continue
        anchor_OI, total_II, pull_OI = _statistics(base, experts, name, tensor, grams)
        values_I, basis_II = torch.linalg.eigh(total_II.double())
        pull_OI = (pull_OI.double() @ basis_II).to(pull_OI)
        layers[name] = _Layer(anchor_OI, pull_OI, basis_II.to(pull_OI), values_I.clamp_min(0).to(pull_OI))
    return PreparedBmm(base, anchored, layers, groups)


def _regressed(base: StateDict, grams: Mapping[str, Tensor] | None, exclude: Sequence[str]) -> list[str]:
    return matrix_names(base, exclude) if grams is None else check_grams("bmm", base, grams, exclude)


def _statistics(
    base: StateDict, experts: Sequence[StateDict], name: str, anchored: Tensor, grams: Mapping[str, Tensor] | None
) -> tuple[Float[Tensor, "O I"], Float[Tensor, "I I"], Float[Tensor, "O I"]]:
    """W_a - W_0, sum_k G_k and sum_k (W_k - W_a) G_k of one matrix."""
    anchor_OI = widened(anchored) - widened(base[name])
    width = anchor_OI.shape[1]
    gram_KII = None if grams is None else gram_of("bmm", name, grams, len(experts), width)
    total_II, pull_OI = anchor_OI.new_zeros((width, width)), torch.zeros_like(anchor_OI)
    for k, (vector_OI,) in enumerate(expert_layers(base, experts, [name])):
        if gram_KII is None:
            # A zero task vector is divided by 1: it has no say.
            norm = torch.linalg.vector_norm(vector_OI)
            unit_OI = vector_OI / torch.where(norm > 0, norm, 1.0)
            own_II = unit_OI.mT @ unit_OI
        else:
            own_II = gram_KII[k].to(vector_OI)
        total_II += own_II
        pull_OI += (vector_OI - anchor_OI) @ own_II
    return anchor_OI, total_II, pull_OI


def _rounding(values_I: Tensor) -> Tensor:
    return len(values_I) * torch.finfo(values_I.dtype).eps * values_I[-1]


def _check_setting(title: str, setting: Setting) -> None:
    for value in setting.values() if isinstance(setting, Mapping) else (setting,):
        if not math.isfinite(value):
            raise ValueError(f"bmm: {title}={value} must be finite")


def _by_name(title: str, setting: Setting, default: float, groups: Mapping[str, str]) -> dict[str, float]:
    """The setting of every matrix."""
    _check_setting(title, setting)
    if not isinstance(setting, Mapping):
        return dict.fromkeys(groups, setting)
    known = sorted(set(groups.values()))
    for group in setting:
        if group not in known:
            raise ValueError(f"bmm: {title} has no group {group!r}; it is one of {', '.join(known)}")
    return {name: setting.get(group, default) for name, group in groups.items()}
