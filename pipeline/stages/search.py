"""Runners of the methods that search by measuring merged models on a labelled validation split, with optuna.

Shape letters: K experts, P points of a front.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from bd_core.methods.pareto_map import ParetoMap, Surrogates, pareto_map
from pipeline.formats.tables import field, write_table
from pipeline.stages.cost import watched
from pipeline.stages.job import Job
from pipeline.stages.merged_files import write_static

FRONT = "front.parquet"
POPULATION = 48  # of a generation; ours
COEFFICIENT, PREDICTED = "coefficient.", "predicted."


def pareto(job: Job) -> None:
    """MAP: sampled merges, quadratics of every task's accuracy, and NSGA-III over them; the front as a table."""
    trials = int(job.options["trials"])
    validate = job.inputs.validation()
    with watched(job.report, "search"):
        found = pareto_map(
            job.experts.base_state,
            job.experts.states,
            validate=validate,
            search=lambda surrogates: nsga_candidates(surrogates, trials=trials, seed=job.seed),
            **job.parameters,
        )
    tasks = job.experts.tasks
    chosen = {
        "coefficients": dict(zip(tasks, found.coefficients.tolist(), strict=True)),
        "measured": dict(zip(tasks, found.metrics.tolist(), strict=True)),
        "r_squared": dict(zip(tasks, found.surrogates.r_squared_T.tolist(), strict=True)),
        "front": len(found.front),
    }
    job.report.metrics |= {"front": float(len(found.front)), "validation_accuracy": float(found.metrics.mean())}
    write_static(job.directory, found.merged, job.recipe | {"chosen": chosen})
    columns = _front_columns(found, tasks)
    write_table(job.directory / FRONT, pa.schema([field(name, pa.float64()) for name in columns]), columns)


def nsga_candidates(surrogates: Surrogates, *, trials: int, seed: int) -> Tensor:
    """The coefficients [P, K] of the last generations' best trade-offs, as the surrogates predict them."""
    import optuna

    n_metrics, n_experts = surrogates.linear_TK.shape

    def predicted(trial: Any) -> list[float]:
        drawn = [trial.suggest_float(f"c{k}", 0.0, surrogates.upper) for k in range(n_experts)]
        values: list[float] = surrogates.predict(torch.tensor([drawn], dtype=torch.float64))[0].tolist()
        return values

    with _quiet():
        sampler = optuna.samplers.NSGAIIISampler(population_size=min(POPULATION, trials), seed=seed)
        study = optuna.create_study(directions=["maximize"] * n_metrics, sampler=sampler)
        study.optimize(predicted, n_trials=trials)
    best = [[trial.params[f"c{k}"] for k in range(n_experts)] for trial in study.best_trials]
    return torch.tensor(best, dtype=torch.float64)


def _front_columns(found: ParetoMap, tasks: tuple[str, ...]) -> dict[str, list[float]]:
    order = found.predicted.mean(1).argsort(descending=True, stable=True)
    columns = {f"{COEFFICIENT}{task}": found.front[order, k].tolist() for k, task in enumerate(tasks)}
    return columns | {f"{PREDICTED}{task}": found.predicted[order, k].tolist() for k, task in enumerate(tasks)}


@contextmanager
def _quiet() -> Iterator[None]:
    """optuna tells every trial on the console, and that NSGA-III may change between its versions; ours is pinned."""
    import optuna

    optuna.logging.set_verbosity(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
