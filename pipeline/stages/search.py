"""Runners of the methods that search by measuring merged models on a labelled validation split, with optuna.

Shape letters: K experts, P points of a front.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from bd_core.methods import merge
from bd_core.methods.bmm import LOG10_LAMBDA, prepare_bmm
from bd_core.methods.pareto_map import ParetoMap, Surrogates, pareto_map
from pipeline.formats.tables import field, write_table
from pipeline.stages.cost import watched
from pipeline.stages.job import Job
from pipeline.stages.merged_files import write_static
from pipeline.training.history import write_history

FRONT = "front.parquet"
POPULATION = 48  # of a generation; ours
# Of BMM's outer level: lambda as the paper has it, the scale around 1 (ours); where the search starts.
SEARCHED = {"log10_lambda": LOG10_LAMBDA, "scale": (0.5, 1.5)}
START = {"log10_lambda": -1.0, "scale": 1.0}
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


def bayesian(job: Job) -> None:
    """BMM: the closed form once, then lambda and scale of every module group by Bayesian optimisation (TPE)."""
    import optuna

    trials = int(job.options["trials"])
    given = job.inputs.given(job.entry.data)
    if not trials:
        with watched(job.report, "merge"):
            merged = merge("bmm", job.experts.base_state, job.experts.states, **job.parameters, **given)
        return write_static(job.directory, merged, job.recipe)
    validate = job.inputs.validation()
    history: list[dict[str, float]] = []
    with watched(job.report, "search"), _quiet():
        prepared = prepare_bmm(job.experts.base_state, job.experts.states, **job.parameters, **given)
        groups = sorted(set(prepared.groups.values()))

        def chosen(parameters: Mapping[str, float]) -> dict[str, dict[str, float]]:
            return {name: {group: parameters[f"{name} {group}"] for group in groups} for name in SEARCHED}

        def measured(trial: Any) -> float:
            for group in groups:
                for name, (low, high) in SEARCHED.items():
                    trial.suggest_float(f"{name} {group}", low, high)
            accuracy = float(validate(prepared.merge(**chosen(trial.params))).mean())
            best = max(accuracy, *(row["best_accuracy"] for row in history[-1:]), 0.0)
            history.append({"step": len(history), "validation_accuracy": accuracy, "best_accuracy": best})
            return accuracy

        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=job.seed))
        # The closed form's own settings first: what is chosen is never worse on the validation images.
        study.enqueue_trial({f"{name} {group}": START[name] for group in groups for name in SEARCHED})
        study.optimize(measured, n_trials=trials)
        found = chosen(study.best_params)
        merged = prepared.merge(**found)
    job.report.metrics |= {"trials": float(trials), "validation_accuracy": float(study.best_value)}
    write_static(job.directory, merged, job.recipe | {"chosen": found | {"validation_accuracy": study.best_value}})
    write_history(job.directory / "history.parquet", history)


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
