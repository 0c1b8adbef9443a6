"""AdaMerging: coefficients learned by minimising the entropy of predictions on unlabelled samples.

Legend: N samples, C classes, K experts, P merged tensors ("layers"), R rows of coefficients: P, or 1 for all tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from bd_core.methods.ties import Trimmed, agreeing, check_keep
from bd_core.task_vectors import TaskVectors, add_task_vectors, task_vectors, widened

__all__ = ["AdaMerging", "adamerging", "check_settings"]

StateDict = Mapping[str, Tensor]
Granularity = Literal["layer", "task"]
Logits = Callable[[dict[str, Tensor], Any, str], Tensor]
# Loss means over the last two windows of this many steps decide whether it has converged (ours).
WINDOW = 50


@dataclass(frozen=True)
class AdaMerging:
    """What AdaMerging found: the merged state dict and how it got there.

    `coefficients` [P, K] in the order of `names`, equal rows where they are task-wise; `history` one loss a step (mean
    entropy over the tasks, in nats); `converged` whether it stopped because the smoothed loss no longer fell.
    """

    merged: dict[str, Tensor]
    names: tuple[str, ...]
    coefficients: Float[Tensor, "P K"]
    history: tuple[float, ...]
    converged: bool


def adamerging(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    logits: Logits,
    batches: Iterable[Mapping[str, Any]],
    granularity: Granularity = "layer",
    keep: float | None = None,
    steps: int = 500,
    learning_rate: float = 1e-3,
    initial: float = 0.3,
    tolerance: float = 1e-3,
    clamp: bool = True,
) -> AdaMerging:
    """theta_0 + sum_k lambda_lk tau_lk per tensor l, lambda minimising sum_tasks mean_n H(softmax(logits)).

    `granularity="layer"` has one coefficient a tensor and expert, "task" one an expert. With `keep` (0.2 in the paper)
    it is AdaMerging++: tau is what Ties-Merging leaves of the task vectors, trimmed to the `keep` share of largest
    magnitudes over the model and without the entries whose sign lost; lambda still weighs each expert by itself.

    `logits(parameters, batch, task)` -> [N, C] must run the model with exactly these parameters; `batches` yields one
    {task: unlabelled batch} a step, the same number of samples for each task. Stops after `steps`, when the batches
    run out, or when the mean loss of the last 50 steps is less than `tolerance` (relative) below that of the 50
    before; `tolerance=0` trains to the end. `clamp` keeps lambda in [0, 1], as the released code does.

    Source: Yang et al., AdaMerging, ICLR 2024: Adam 1e-3, initial 0.3, batches of 16 (the released code takes two a
    task and step), 500 steps. The convergence test is ours. Summing all tasks' graphs, as released, needs tens of GB;
    here the tasks of a step are run one after another on one merged copy, and lambda's gradient is one contraction
    with its gradient. Memory: K task vectors, one merged copy with its gradient, one task's activations.
    """
    check_settings(
        granularity=granularity,
        keep=keep,
        steps=steps,
        learning_rate=learning_rate,
        initial=initial,
        tolerance=tolerance,
    )
    vectors = task_vectors(base, experts)
    if keep is not None:
        vectors = _without_conflicts(vectors, base, experts, keep)
    n_rows = len(vectors.names) if granularity == "layer" else 1
    raw_RK = torch.full((n_rows, vectors.n_experts), float(initial), requires_grad=True)
    optimiser = torch.optim.Adam([raw_RK], lr=learning_rate)
    history: list[float] = []
    converged = False

    def coefficients() -> Tensor:
        found_RK = raw_RK.detach().clamp(0.0, 1.0) if clamp else raw_RK.detach()
        return found_RK.expand(len(vectors.names), -1).clone()

    for batch_of in _limited(batches, steps):
        merged = _leaves(base, vectors, coefficients())
        history.append(_accumulate(merged, vectors, batch_of, logits))
        gradient_PK = torch.stack(
            [_contraction(merged[name].grad, vectors.vectors[name]).to(raw_RK) for name in vectors.names]
        )
        gradient_RK = gradient_PK if granularity == "layer" else gradient_PK.sum(0, keepdim=True)
        if clamp:  # as torch.clamp: no gradient from outside the range
            gradient_RK *= (raw_RK.detach() >= 0) & (raw_RK.detach() <= 1)
        raw_RK.grad = gradient_RK
        optimiser.step()
        converged = _has_converged(history, tolerance)
        if converged:
            break
    if not history:
        raise ValueError("adamerging: batches gave no batch; give at least one {task: batch}")
    found_PK = coefficients()
    merged = add_task_vectors(base, vectors, dict(zip(vectors.names, found_PK, strict=True)))
    return AdaMerging(merged, vectors.names, found_PK, tuple(history), converged)


def check_settings(
    *,
    granularity: str = "layer",
    keep: float | None = None,
    steps: int = 500,
    learning_rate: float = 1e-3,
    initial: float = 0.3,
    tolerance: float = 1e-3,
    **_: object,
) -> None:
    """`ValueError` when `adamerging` would refuse these; costs nothing, so that a configuration can be checked."""
    if granularity not in ("layer", "task"):
        raise ValueError(f"adamerging: granularity={granularity!r} must be one of layer, task")
    if keep is not None:
        check_keep("adamerging", keep)
    if steps < 1:
        raise ValueError(f"adamerging: steps={steps} must be at least 1")
    if not math.isfinite(initial):
        raise ValueError(f"adamerging: initial={initial} must be finite")
    for name, value in (("learning_rate", learning_rate), ("tolerance", tolerance)):
        if not value >= 0:
            raise ValueError(f"adamerging: {name}={value} must not be negative")


def _without_conflicts(vectors: TaskVectors, base: StateDict, experts: Sequence[StateDict], keep: float) -> TaskVectors:
    """The task vectors with everything that Ties-Merging does not sum at zero, each still by itself; in place."""
    trimmed = Trimmed(base, experts, keep, "global")
    for name in trimmed.names:
        agreeing(trimmed.apply(vectors.vectors[name].flatten(1), name), trimmed)
    return vectors


def _accumulate(merged: dict[str, Tensor], vectors: TaskVectors, batch_of: Mapping[str, Any], logits: Logits) -> float:
    """The mean entropy over the tasks; leaves the gradient of their sum in the merged leaves, task after task."""
    if not batch_of:
        raise ValueError("adamerging: a step's batches are empty; each must hold one batch a task")
    total = 0.0
    for task, batch in batch_of.items():
        log_p_NC = F.log_softmax(logits(merged, batch, task), dim=-1)
        entropy = -(log_p_NC.exp() * log_p_NC).sum(-1).mean()
        value = float(entropy.detach())
        if value != value:
            raise ValueError(f"adamerging: the loss of task {task} is NaN; check its logits")
        entropy.backward()  # type: ignore[no-untyped-call]
        total += value
    return total / len(batch_of)


def _leaves(base: StateDict, vectors: TaskVectors, coefficients_PK: Tensor) -> dict[str, Tensor]:
    """The merged model as leaves that collect gradients; what is not merged as it is."""
    merged = {name: tensor.detach() for name, tensor in vectors.constants.items()}
    for name, c_K in zip(vectors.names, coefficients_PK, strict=True):
        stacked = vectors.vectors[name]
        value = widened(base[name]) + torch.tensordot(c_K.to(stacked), stacked, dims=1)
        merged[name] = value.to(base[name].dtype).requires_grad_()
    return {name: merged[name] for name in base}


def _contraction(gradient: Tensor | None, stacked: Float[Tensor, "K ..."]) -> Float[Tensor, " K"]:
    """d loss / d lambda_k = <gradient, tau_k>; zero for a tensor the model never used."""
    if gradient is None:
        return stacked.new_zeros(len(stacked))
    return stacked.flatten(1) @ gradient.to(stacked.dtype).flatten()


def _has_converged(history: Sequence[float], tolerance: float) -> bool:
    if tolerance == 0 or len(history) < 2 * WINDOW:
        return False
    before = sum(history[-2 * WINDOW : -WINDOW]) / WINDOW
    now = sum(history[-WINDOW:]) / WINDOW
    return before - now < tolerance * abs(before)


def _limited(batches: Iterable[Mapping[str, Any]], steps: int) -> Iterator[Mapping[str, Any]]:
    """At most `steps` items, without drawing one more from an endless stream."""
    yield from (batch for _, batch in zip(range(steps), batches, strict=False))
