"""The same units as Ray tasks, on this machine or on a cluster that sees the same store.

Tasks rather than actors: a worker process keeps the stage it set up last, and Ray hands it the next unit of the same
stage, so models are loaded once a worker as with actors, while nothing holds a CPU when a stage has ended and Ray Train
can take it. A fit is a task as well: it holds no CPU and starts the Ray Train job whose workers do. Only paths, names
and settings travel. A dead worker or a lost object is retried by Ray up to three times; an exception of ours never is.
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import interrupts, logs
from pipeline.executors.ray_session import RaySession, RaySpec
from pipeline.executors.unit import Outcome, Planned, UnitRunner, failed
from pipeline.stage import Stage
from pipeline.store import Store
from pipeline.training.fit_stage import FitStage

RETRIES_ON_WORKER_DEATH = 3
ASK_AGAIN_S = 1.0  # how often a wait looks whether it was to be interrupted


class RayExecutor:
    """Runs units as Ray tasks and fits as Ray Train jobs."""

    def __init__(self, spec: RaySpec, store: Store, run_id: str, stages: Sequence[Stage] = ()) -> None:
        """Reach Ray, and see that each of `stages` can run there: `ConfigError` when one asks for too much."""
        self._spec, self._store, self._run_id = spec, store, run_id
        self._session = RaySession(spec)
        try:
            for stage in stages:
                self._session.check(stage)
        except BaseException:
            self._session.close()
            raise
        self._waiting: dict[Any, tuple[str, Planned]] = {}

    def start(self, stage: Stage, planned: Sequence[Planned]) -> None:
        """Hand every unit of `planned` to Ray."""
        ray = self._session.ray
        self._session.check(stage)
        fits = isinstance(stage, FitStage)
        # Set here and not in `.options()`, which refuses it: with a GPU Ray would start a new process for every task.
        task = ray.remote(max_calls=0)(_fit_unit if fits else _run_unit).options(
            num_cpus=0 if fits else stage.resources.cpus,
            num_gpus=0 if fits else stage.resources.gpus,
            max_retries=RETRIES_ON_WORKER_DEATH,
            retry_exceptions=False,
            name=stage.name,
        )
        # Equal tokens share one set-up; every call of `start` has units of its own.
        token = f"{self._run_id}-{stage.name}-{planned[0].key}"
        shared = ray.put((stage, self._store.root, self._run_id, self._spec if fits else token))
        self._waiting |= {task.remote(shared, each): (stage.name, each) for each in planned}

    def wait(self) -> tuple[str, Outcome]:
        """The stage's name and the outcome of the next unit to end."""
        ray = self._session.ray
        ended: list[Any] = []
        while not ended:
            interrupts.check()
            ended, _ = ray.wait(list(self._waiting), num_returns=1, timeout=ASK_AGAIN_S)
        (reference,) = ended
        stage, each = self._waiting.pop(reference)
        try:
            outcome: Outcome = ray.get(reference)
        except ray.exceptions.RayError as error:
            # Ray itself gave the unit up: its worker was lost more often than it retries.
            outcome = failed(self._store, self._run_id, stage, each.unit.id, error)
        return stage, outcome

    def drop(self) -> list[str]:
        """Nothing: Ray has all units and does not say which have begun, and to cancel those would lose their work."""
        return []

    def close(self) -> None:
        """Leave Ray; a local one ends."""
        self._session.close()


_RUNNERS: dict[str, UnitRunner] = {}


def _run_unit(shared: tuple[Stage, Path, str, str], planned: Planned) -> Outcome:
    """One unit on a worker; the process keeps its runner, and with it the stage it set up last."""
    stage, root, run_id, token = shared
    logs.configure()
    if run_id not in _RUNNERS:
        _RUNNERS.clear()
        _RUNNERS[run_id] = UnitRunner(Store(root), run_id)
    return _RUNNERS[run_id](stage, planned, token)


def _fit_unit(shared: tuple[FitStage, Path, str, RaySpec], planned: Planned) -> Outcome:
    """One fit: the Ray Train job is started from here, so that fits of one stage run side by side."""
    from pipeline.executors.ray_train import fit_on_ray

    stage, root, run_id, spec = shared
    logs.configure()
    _RUNNERS.clear()  # whatever the last stage loaded is not needed any more
    gc.collect()
    outcome = fit_on_ray(stage, planned, Store(root), run_id, max_failures=spec.train_max_failures)
    gc.collect()  # the trainer sits in a cycle, and as long as it does, the job's controller lives
    return outcome
