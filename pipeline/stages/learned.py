"""Runners of the competitors that learn: coefficients on unlabelled batches, and routers.

Shape letters: B batch, K experts, W token width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bd_core.methods import twin_merging
from bd_core.router import Router
from pipeline.formats.checkpoints import write_safetensors
from pipeline.stages.cost import watched
from pipeline.stages.job import Job
from pipeline.stages.merged_files import write_routed, write_static
from pipeline.stages.model_card import PRETRAINED
from pipeline.store import Store
from pipeline.training.context import LocalContext, TrainingContext
from pipeline.training.history import write_history
from pipeline.training.loop import History, optimise

TWIN_STEPS, TWIN_BATCH, TWIN_LEARNING_RATE = 300, 256, 1e-3


def fit_coefficients(job: Job) -> None:
    """AdaMerging in any form: on the same unlabelled pool that BD-Merging's router is fitted on."""
    with watched(job.report, "forward_backward"):
        found = job.entry.method.function(
            job.experts.base_state, job.experts.states, **job.parameters, **job.inputs.given(job.entry.data)
        )
    job.report.metrics |= {"steps": float(len(found.history)), "converged": float(found.converged)}
    write_static(job.directory, found.merged, job.recipe)
    write_history(job.directory / "history.parquet", [{"step": i, "loss": v} for i, v in enumerate(found.history)])


def twin(job: Job) -> None:
    """Twin-Merging: shared and exclusive parts, and a router that is told the task of every training image."""
    experts, pool = job.experts, job.inputs.pool
    with watched(job.report, "forward_backward"):
        parts = twin_merging(experts.base_state, experts.states, **job.parameters)
        router, history = fit_twin_router(
            pool.tokens(),
            [experts.tasks.index(task) for task in pool.tasks()],
            experts.count,
            seed=job.seed,
            context=LocalContext(Store.state_beside(job.directory)),
        )
    job.report.metrics |= {"router_task_accuracy": history[-1]["task_accuracy"]}
    config: dict[str, Any] = {
        "width": router.width,
        "experts": list(experts.tasks),
        "n_groups": 1,
        "groups": ["all layers"],
        "hidden": None,
        "kind": "mlp",
        "null_expert": False,
    }
    group_of = dict.fromkeys(experts.groups.index, 0)
    # Its vectors are added to a shared model, and its router reads the tokens of theta_0.
    write_safetensors(job.directory / PRETRAINED, experts.base_state)
    recipe = job.recipe | {"router": config, "group_of": group_of}
    write_routed(job.directory, parts.shared, parts.exclusive.expanded(), router, recipe)
    write_history(job.directory / "history.parquet", history)


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
