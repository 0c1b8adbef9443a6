"""The one training loop: seeded by step, checkpointed, equal bytes with and without an interruption."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import DataError
from pipeline.training.context import TrainingContext

StepLoss = Callable[[torch.Generator], tuple[Tensor, dict[str, float]]]
History = list[dict[str, float]]


def optimise(
    module: nn.Module,
    step_loss: StepLoss,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    context: TrainingContext,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    cosine: bool = False,
    clip_norm: float | None = None,
    checkpoint_every: int = 100,
) -> History:
    """The loss terms of every step, as the first worker here saw them; `module` is fitted in place with Adam(W).

    `step_loss(generator)` gives the loss of one worker's slice of one batch and its terms. The generator depends only
    on (seed, step, worker), so a resumed fit draws what an undisturbed one would have drawn.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    history: History = []
    state = context.load()
    if state is not None:
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        history = list(state["history"])
    for step in range(len(history), steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * schedule(step, steps, warmup_steps, cosine)
        optimiser.zero_grad(set_to_none=True)
        row: dict[str, float] = {}
        for rank in context.ranks:
            loss, terms = step_loss(step_generator(seed, step, rank))
            if not torch.isfinite(loss):
                raise DataError(f"step {step}: the loss is {loss.item()} with terms {terms}; lower the learning rate")
            loss.backward()  # type: ignore[no-untyped-call]
            row = row or {"step": float(step), "loss": loss.item(), **terms}
        context.average_gradients(module)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimiser.step()
        history.append(row)
        if checkpoint_every and (step + 1) % checkpoint_every == 0 and step + 1 < steps:
            context.save(_state(module, optimiser, history), history[-1])
    return history


def step_generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """A CPU generator for one step of one worker."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB + 1) % 2**63
    return torch.Generator().manual_seed(mixed)


def schedule(step: int, steps: int, warmup_steps: int, cosine: bool) -> float:
    """The factor on the learning rate: linear warm-up, then constant or half a cosine down to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if not cosine:
        return 1.0
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress))))


def _state(module: nn.Module, optimiser: torch.optim.Optimizer, history: History) -> dict[str, Any]:
    return {"module": module.state_dict(), "optimiser": optimiser.state_dict(), "history": history}
