"""A connection to Ray: one of our own on this machine, or a cluster that is already there."""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field

from pipeline import logs
from pipeline.config import Spec
from pipeline.errors import ConfigError
from pipeline.stage import Stage
from pipeline.training.fit_stage import FitStage

LOCAL = "local"
SCRATCH = "bd-merge-"
# Socket paths may have 107 characters, so a session's directory is short and does not follow TMPDIR.
SCRATCH_PARENT = Path("/tmp")

# Set before Ray is imported, unless the user has set them.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's own 15 is for nodes that do nothing else; beside any other work its workers would hardly run.
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    # Polled every 2 s otherwise: a short fit would mostly wait.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # A fit waits for its turn; a minute, Ray's own limit, would only start it over and over.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "86400",
    # The actor of its own that watches for pre-emption costs more than it gives to fits that checkpoint anyway.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class RaySpec(Spec):
    """How to reach Ray. Changes no bytes."""

    kind: Literal["ray"] = "ray"
    # "local" starts a Ray of our own and never joins one that happens to run; "auto" and "host:port" join a cluster.
    address: str = LOCAL
    cpus: int | None = Field(default=None, ge=1, description="CPUs of a local Ray; None takes the machine's")
    object_store_mib: int = Field(default=128, ge=80, description="only paths travel, so a small one is enough")
    train_max_failures: int = Field(default=3, ge=0, description="how often a fit that lost a worker goes on")


class RaySession:
    """Ray, reached; `close` leaves it, and ends it when it is our own."""

    def __init__(self, spec: RaySpec) -> None:
        self.spec = spec
        self._scratch: Path | None = None
        own = spec.address == LOCAL
        if own:
            # A local Ray listens on loopback only; a token would be left behind for other commands to trip over.
            os.environ["RAY_AUTH_MODE"] = "disabled"
            _sweep()
            self._scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-", dir=SCRATCH_PARENT))
        else:
            has_token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
            os.environ.setdefault("RAY_AUTH_MODE", "token" if has_token else "disabled")
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            self.ray = self._connect(own)
        except BaseException:
            self._remove_scratch()
            raise
        self.cpus = self.total("CPU")
        logs.fact("ray ready", address=spec.address, nodes=len(self._nodes()), cpus=f"{self.cpus:g}")

    def _connect(self, own: bool) -> ModuleType:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if own:
            options |= {
                "num_cpus": self.spec.cpus or os.cpu_count(),
                "include_dashboard": False,
                "object_store_memory": self.spec.object_store_mib * 2**20,
                "_temp_dir": str(self._scratch),
            }
        with _keeping_signal_handlers():
            import ray

            try:
                ray.init(address=self.spec.address, **options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"executor.address {self.spec.address!r}: Ray cannot be reached ({error}); start it, or set "
                    "executor.address=local"
                ) from error
        assert isinstance(ray, ModuleType)
        return ray

    def total(self, resource: str) -> float:
        """How much of `resource` all nodes have together."""
        return float(sum(node["Resources"].get(resource, 0.0) for node in self._nodes()))

    def check(self, stage: Stage) -> None:
        """`ConfigError` when `stage` asks for more than there is: its units would wait for ever."""
        workers = stage.workers if isinstance(stage, FitStage) else 1
        for resource, option in (("CPU", "cpus"), ("GPU", "gpus")):
            wanted = getattr(stage.resources, option)
            key = f"resources.{stage.name}.{option}"
            there = f"the Ray at {self.spec.address}"
            more = ", or add nodes" if self.spec.address != LOCAL else ", or set executor.cpus" * (resource == "CPU")
            largest = max((node["Resources"].get(resource, 0.0) for node in self._nodes()), default=0.0)
            if wanted > largest:
                raise ConfigError(
                    f"{key}: a unit wants {wanted:g} {resource}, the largest node of {there} has {largest:g}; "
                    f"lower it{more}"
                )
            if wanted * workers > self.total(resource):
                raise ConfigError(
                    f"{stage.name}.workers: {workers} workers with {key}={wanted:g} each, {there} has "
                    f"{self.total(resource):g} {resource}; lower either{more}"
                )

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def close(self) -> None:
        """Leave Ray; a local one ends and its directory goes with it."""
        self.ray.shutdown()
        self._remove_scratch()

    def _remove_scratch(self) -> None:
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)


@contextlib.contextmanager
def _keeping_signal_handlers() -> Iterator[None]:
    """Ray installs handlers of its own; a signal must go on to mean what our command line made of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _sweep() -> None:
    """Remove the directories of local Rays whose process was killed; Ray's processes die with it."""
    for path in SCRATCH_PARENT.glob(f"{SCRATCH}*-*"):
        pid = path.name.removeprefix(SCRATCH).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)
