"""Runners of the competitors that learn: coefficients on unlabelled batches, and routers.

Shape letters: B batch, K experts, W token width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bd_core.layer_groups import LayerGroups
from bd_core.losses import unsupervised_loss
from bd_core.merged import MergedModel
from bd_core.methods import twin_merging
from bd_core.methods.wemoe import wemoe
from bd_core.router import Router
from bd_core.task_vectors import TaskVectors
from pipeline.formats.checkpoints import write_safetensors
from pipeline.stages.cost import watched
from pipeline.stages.job import Job
from pipeline.stages.merged_files import tell_fallback, write_routed, write_static
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
    groups = LayerGroups(dict.fromkeys(experts.groups.index, 0), ("all layers",))
    _write(job, parts.shared, parts.exclusive.expanded(), groups, router, history)


def wemoe_gates(job: Job) -> None:
    """WEMoE: a gate for every block's MLP, fitted on the entropy of the merged model's predictions and nothing else."""
    experts, inputs = job.experts, job.inputs
    backbone, tokens_NW = inputs.backbone, inputs.pool.tokens()
    batch_per_task = job.unit.settings["batch_per_task"]
    with watched(job.report, "forward_backward"):
        parts = wemoe(experts.base_state, experts.states, **job.parameters)
        merged = MergedModel(backbone.visual, parts.static, parts.vectors, parts.groups)
        gate = parts.gate(tokens_NW.shape[1], generator=torch.Generator().manual_seed(job.seed))
        gate.standardise(tokens_NW)

        def step_loss(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
            drawn = [
                rows[torch.randint(len(rows), (batch_per_task,), generator=generator)] for rows in inputs.rows.values()
            ]
            rows_B = torch.cat(drawn)
            images = backbone.normalise(inputs.images[rows_B])
            features = nn.functional.normalize(merged(images, weights=gate(tokens_NW[rows_B])), dim=-1)
            entropies = [
                unsupervised_loss(backbone.logit_scale * part @ head.T)
                for part, head in zip(torch.split(features, batch_per_task), inputs.heads.values(), strict=True)
            ]
            return torch.stack(entropies).sum(), {}

        history = optimise(
            gate,
            step_loss,
            steps=int(job.options["steps"]),
            learning_rate=float(job.options["learning_rate"]),
            seed=job.seed,
            context=LocalContext(Store.state_beside(job.directory)),
        )
    job.report.notes |= tell_fallback(merged, f"baselines {job.unit.id}")
    job.report.metrics |= {"final_loss": history[-1]["loss"]}
    _write(job, parts.static, parts.vectors, parts.groups, gate, history)


def _write(
    job: Job, base: Mapping[str, Tensor], vectors: TaskVectors, groups: LayerGroups, router: Router, history: History
) -> None:
    """The routed artefact of a method that adds its vectors to another model than theta_0, whose tokens it reads."""
    config: dict[str, Any] = {
        "width": router.width,
        "experts": list(job.experts.tasks),
        "n_groups": groups.n_groups,
        "groups": list(groups.titles),
        "hidden": None,
        "kind": "mlp",
        "null_expert": False,
        "output": router.output,
    }
    write_safetensors(job.directory / PRETRAINED, job.experts.base_state)
    write_routed(job.directory, base, vectors, router, job.recipe | {"router": config, "group_of": dict(groups.index)})
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
