"""Representation Surgery: a small module a task that moves the merged model's features back to the expert's.

Legend: K experts (one a task), B batch, D width of the features, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from bd_core.methods.averages import task_arithmetic
from bd_core.methods.stream import StateDict

__all__ = ["FittedSurgery", "Surgery", "check_settings", "fit_surgery", "surgery"]

Features = Callable[[StateDict, Any], Tensor]


class Surgery(nn.Module):
    """z' = z - Up_t ReLU(Down_t z) for a merged model's features z [B, D] of task t.

    Up starts at zero, so that features start unchanged, Down uniform in +-1/sqrt(D), as released. `generator` draws
    it; None is a fresh one with seed 0. The state dict holds `down` [K, R, D] and `up` [K, D, R] in `tasks`' order.
    """

    def __init__(
        self, tasks: Sequence[str], width: int, *, rank: int = 16, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"Surgery: tasks are {list(tasks)}; give one or more, each once")
        for name, size in (("width", width), ("rank", rank)):
            if size < 1:
                raise ValueError(f"Surgery: {name}={size} must be at least 1")
        self.tasks = tuple(tasks)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        bound = 1 / math.sqrt(width)
        self.down = nn.Parameter(torch.empty(len(tasks), rank, width).uniform_(-bound, bound, generator=generator))
        self.up = nn.Parameter(torch.zeros(len(tasks), width, rank))

    def forward(self, features_BD: Float[Tensor, "B D"], task: str) -> Float[Tensor, "B D"]:
        """The features as task `task`'s expert would have them, in their own dtype; each row by itself."""
        if task not in self.tasks:
            raise ValueError(f"Surgery: no task {task!r}; it was made for {', '.join(self.tasks)}")
        t = self.tasks.index(task)
        wide_BD = features_BD.to(self.down.dtype)
        bias_BD = F.linear(F.relu(F.linear(wide_BD, self.down[t])), self.up[t])
        return (wide_BD - bias_BD).to(features_BD.dtype)


@dataclass(frozen=True)
class FittedSurgery:
    """A merged model and the module that corrects its features; `history` is the mean L1 loss of every step."""

    merged: dict[str, Tensor]
    module: Surgery
    history: tuple[float, ...]


def surgery(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    features: Features,
    batches: Iterable[Mapping[str, Any]],
    merged: StateDict | None = None,
    rank: int = 16,
    steps: int = 500,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> FittedSurgery:
    """`merged` as it is, and a `Surgery` of its features, fitted on unlabelled batches; on top of any merge.

    `features(state, batch)` -> [B, D] runs the model with this state; `batches` yields one {task: batch} a step, the
    tasks in the order of their experts. `merged` is any merged model, None Task Arithmetic's with 0.3. A sample's
    task must be known to use the result. `fit_surgery` is the fit itself, for features that were kept.

    Source: Yang et al., Representation Surgery for Multi-Task Model Merging, ICML 2024: rank 16, L1 loss, Adam 1e-3,
    500 iterations on 16 samples a task. Their code takes two Adam steps an iteration, FusionBench 1000 steps of one.
    Cost: `steps` forward passes of the merged model and of every expert; no backward pass through a model.
    """
    check_settings(rank=rank, steps=steps, learning_rate=learning_rate)
    state = dict(merged if merged is not None else task_arithmetic(base, experts))

    @torch.no_grad()
    def pairs() -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        for batch_of in batches:
            if len(batch_of) != len(experts):
                raise ValueError(
                    f"surgery: a step's batches are of {len(batch_of)} tasks, there are {len(experts)} experts; "
                    "give one batch for each, in their order"
                )
            yield {
                task: (features(state, batch), features(expert, batch))
                for (task, batch), expert in zip(batch_of.items(), experts, strict=True)
            }

    module, history = fit_surgery(pairs(), rank=rank, steps=steps, learning_rate=learning_rate, seed=seed)
    return FittedSurgery({name: state[name] for name in base}, module, history)


def fit_surgery(
    pairs: Iterable[Mapping[str, tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]]]],
    *,
    rank: int = 16,
    steps: int = 500,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> tuple[Surgery, tuple[float, ...]]:
    """The module that brings merged features to the experts', and the mean L1 loss over the tasks of every step.

    `pairs` yields {task: (merged features, expert's features)}, at least one step, at most `steps` of which are used;
    the first sets tasks and width. Tasks share no parameter: one Adam for all is one for each. The result is in
    evaluation mode, on the features' device.
    """
    check_settings(rank=rank, steps=steps, learning_rate=learning_rate)
    module: Surgery | None = None
    history: list[float] = []
    with torch.enable_grad():
        for _, pair_of in zip(range(steps), pairs, strict=False):
            if module is None:
                if not pair_of:
                    raise ValueError("surgery: the first step holds no task; each must hold features of every task")
                merged_BD = next(iter(pair_of.values()))[0]
                drawn = torch.Generator().manual_seed(seed)
                module = Surgery(tuple(pair_of), merged_BD.shape[1], rank=rank, generator=drawn).to(merged_BD.device)
                optimiser = torch.optim.Adam(module.parameters(), lr=learning_rate)
            if set(pair_of) != set(module.tasks):
                raise ValueError(
                    f"surgery: step {len(history)} has tasks {', '.join(pair_of)}, the first {', '.join(module.tasks)}"
                )
            losses = torch.stack([_distance(module, task, *pair) for task, pair in pair_of.items()])
            optimiser.zero_grad()
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            history.append(float(losses.detach().mean()))
    if module is None:
        raise ValueError("surgery: batches gave no batch; give at least one {task: batch}")
    return module.eval(), tuple(history)


def check_settings(*, rank: int = 16, steps: int = 500, learning_rate: float = 1e-3, **_: object) -> None:
    """`ValueError` when `surgery` would refuse these; costs nothing, so that a configuration can be checked."""
    for name, count in (("rank", rank), ("steps", steps)):
        if count < 1:
            raise ValueError(f"surgery: {name}={count} must be at least 1")
    if not learning_rate >= 0:
        raise ValueError(f"surgery: learning_rate={learning_rate} must not be negative")


def _distance(module: Surgery, task: str, merged_BD: Tensor, expert_BD: Tensor) -> Tensor:
    if merged_BD.shape != expert_BD.shape:
        raise ValueError(
            f"surgery: task {task} has merged features {list(merged_BD.shape)} and the expert's {list(expert_BD.shape)}"
        )
    wide_BD = merged_BD.detach().to(module.down.dtype)
    loss = F.l1_loss(module(wide_BD, task), expert_BD.detach().to(wide_BD.dtype))
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"surgery: the loss of task {task} is not finite; check its features")
    return loss
