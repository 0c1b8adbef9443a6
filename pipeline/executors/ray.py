"""The same units as Ray tasks, on this machine or on a cluster that sees the same store.

Tasks rather than actors: a worker process keeps the stage it set up last, and Ray hands it the next unit of the same
stage, so models are loaded once a worker as with actors, while nothing holds a CPU when a stage has ended and Ray Train
can take it. Only paths, names and settings travel. A dead worker or a lost object is retried by Ray up to three times;
an exception of ours never is.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline import logs
from pipeline.config import Spec
from pipeline.errors import ConfigError
from pipeline.executors.unit import Outcome, Planned, UnitRunner, failed
from pipeline.stage import Stage
from pipeline.store import Store
from pipeline.training.fit_stage import FitStage

RETRIES_ON_WORKER_DEATH = 3


class RaySpec(Spec):
    """How to reach Ray. Changes no bytes."""

    kind: Literal["ray"] = "ray"
    # "local" starts a Ray of our own and never joins one that happens to run; "auto" and "host:port" join a cluster.
    address: str = "local"
    cpus: int | None = Field(default=None, ge=1, description="CPUs of a local Ray; None takes the machine's")
    object_store_mib: int = Field(default=128, ge=80, description="only paths travel, so a small one is enough")
    train_max_failures: int = Field(default=3, ge=0)


class RayExecutor:
    """Runs units as Ray tasks and fits as Ray Train jobs."""

    def __init__(self, spec: RaySpec, store: Store, run_id: str) -> None:
        self._spec, self._store, self._run_id = spec, store, run_id
        self._scratch: Path | None = None
        self._connect()

    def _connect(self) -> None:
        local = self._spec.address == "local"
        if local:
            # A local Ray listens on loopback only; a token would be left behind for other commands to trip over.
            os.environ["RAY_AUTH_MODE"] = "disabled"
        os.environ.setdefault("RAY_AUTH_MODE", "token" if "RAY_AUTH_TOKEN" in os.environ else "disabled")
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        import ray

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "ignore_reinit_error": False}
        if local:
            # Socket paths have a limit of 107 characters, so the session gets a short directory of its own.
            self._scratch = Path(tempfile.mkdtemp(prefix="bdm", dir="/tmp"))
            options |= {
                "num_cpus": self._spec.cpus or os.cpu_count(),
                "include_dashboard": False,
                "object_store_memory": self._spec.object_store_mib * 2**20,
                "_temp_dir": str(self._scratch),
            }
        try:
            ray.init(address=self._spec.address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"executor.address {self._spec.address!r}: Ray cannot be reached ({error}); start it, or set "
                "executor.address=local"
            ) from error
        self._ray = ray
        self.parallelism = max(1, int(ray.cluster_resources().get("CPU", 1)))
        logs.fact("ray ready", address=self._spec.address, cpus=self.parallelism)

    def run(self, stage: Stage, planned: Sequence[Planned], done: Callable[[Outcome], None]) -> None:
        """Do every unit of `planned`, calling `done` once for each as it ends."""
        self._check_resources(stage)
        if isinstance(stage, FitStage):
            from pipeline.executors.ray_train import fit_on_ray

            for each in planned:
                done(self._guarded(stage, each, lambda p: fit_on_ray(stage, p, self._store, self._run_id, self._spec)))
            return
        token = f"{self._run_id}-{stage.name}-{planned[0].key}"
        task = self._ray.remote(_run_unit).options(
            num_cpus=stage.resources.cpus,
            num_gpus=stage.resources.gpus,
            max_retries=RETRIES_ON_WORKER_DEATH,
            retry_exceptions=False,
            max_calls=0,
            name=stage.name,
        )
        shared = self._ray.put((stage, str(self._store.root), self._run_id, token))
        waiting = {task.remote(shared, each): each for each in planned}
        while waiting:
            ready, _ = self._ray.wait(list(waiting), num_returns=1)
            for reference in ready:
                each = waiting.pop(reference)
                done(self._guarded(stage, each, lambda _, reference=reference: self._ray.get(reference)))

    def _guarded(self, stage: Stage, each: Planned, outcome: Callable[[Planned], Outcome]) -> Outcome:
        """The outcome, or a failed one when Ray itself gave the unit up (worker lost more often than it retries)."""
        try:
            return outcome(each)
        except self._ray.exceptions.RayError as error:
            return failed(self._store, self._run_id, stage.name, each.unit.id, error)

    def _check_resources(self, stage: Stage) -> None:
        total = self._ray.cluster_resources()
        for name, wanted in (("CPU", stage.resources.cpus), ("GPU", stage.resources.gpus)):
            if wanted > total.get(name, 0):
                raise ConfigError(
                    f"stage {stage.name} wants {wanted:g} {name}, the Ray at {self._spec.address} has "
                    f"{total.get(name, 0):g}; lower resources.{stage.name}.{name.lower()}s or add nodes"
                )

    def close(self) -> None:
        """Leave Ray; a local one ends and its directory goes with it."""
        self._ray.shutdown()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)


_RUNNERS: dict[str, UnitRunner] = {}


def _run_unit(shared: tuple[Stage, str, str, str], planned: Planned) -> Outcome:
    """One unit on a worker; the process keeps its runner, and with it the stage it set up last."""
    stage, root, run_id, token = shared
    logs.configure()
    if run_id not in _RUNNERS:
        _RUNNERS.clear()
        _RUNNERS[run_id] = UnitRunner(Store(Path(root)), run_id)
    return _RUNNERS[run_id](stage, planned, token)
