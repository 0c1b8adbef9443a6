"""What the competitors that learn are given: AdaMerging its unlabelled batches, Twin-Merging its supervised router.

Shape letters: B batch, C classes, K experts, W token width.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bd_core.methods import AdaMerging, adamerging
from bd_core.router import Router
from pipeline.backbones.open_clip import Backbone
from pipeline.stages.images import PoolImages
from pipeline.stages.models import Experts
from pipeline.training.context import TrainingContext
from pipeline.training.loop import History, optimise, step_generator

TWIN_STEPS, TWIN_BATCH, TWIN_LEARNING_RATE = 300, 256, 1e-3


def fit_adamerging(
    backbone: Backbone,
    experts: Experts,
    heads: Mapping[str, Tensor],
    images: PoolImages,
    task_rows: Mapping[str, Tensor],
    *,
    seed: int,
    batch_per_task: int,
    parameters: Mapping[str, Any],
) -> AdaMerging:
    """Layer-wise AdaMerging on the same unlabelled pool that BD-Merging's router is fitted on."""

    def logits(state: dict[str, Tensor], pixels: Tensor, task: str) -> Tensor:
        features = functional_call(backbone.visual, state, (backbone.normalise(pixels),))
        return backbone.logit_scale * nn.functional.normalize(features, dim=-1) @ heads[task].T

    def batches() -> Iterator[dict[str, Tensor]]:
        step = 0
        while True:
            generator = step_generator(seed, step)
            yield {
                task: images[rows[torch.randint(len(rows), (batch_per_task,), generator=generator)]]
                for task, rows in task_rows.items()
            }
            step += 1

    return adamerging(experts.base_state, experts.states, logits=logits, batches=batches(), **parameters)


def fit_twin_router(
    tokens_NW: Tensor, task_of_row: Sequence[int], n_tasks: int, *, seed: int, context: TrainingContext
) -> tuple[Router, History]:
    """Twin-Merging's router: supervised by the task each image came from, which no other method here is told."""
    router = Router(tokens_NW.shape[1], n_tasks, generator=torch.Generator().manual_seed(seed))
    router.standardise(tokens_NW)
    task_N = torch.tensor(task_of_row)

    def step_loss(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = torch.randint(len(tokens_NW), (TWIN_BATCH,), generator=generator)
        weights_BK = router(tokens_NW[rows])[:, 0]
        loss = nn.functional.nll_loss(weights_BK.clamp_min(1e-12).log(), task_N[rows])
        return loss, {"task_accuracy": (weights_BK.argmax(-1) == task_N[rows]).float().mean().item()}

    history = optimise(
        router, step_loss, steps=TWIN_STEPS, learning_rate=TWIN_LEARNING_RATE, seed=seed, context=context
    )
    return router, history
