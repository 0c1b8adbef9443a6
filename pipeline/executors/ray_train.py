"""The Ray Train job around a fit: workers, failures, checkpoints. The mathematics stays in the plain loop."""

import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.executors.unit import Outcome, Planned, UnitRunner, failed
from pipeline.store import Store
from pipeline.store.keys import KEY_CHARS_IN_NAMES
from pipeline.training.context import read_state, write_state
from pipeline.training.fit_stage import FitStage

RAY_TRAIN_DIRECTORY = ".ray_train"


class TrainSpec(Protocol):
    """What of the executor's spec a Ray Train job needs."""

    train_max_failures: int


class RayContext:
    """A worker of a Ray Train job; its state goes where Ray keeps checkpoints."""

    def __init__(self) -> None:
        from ray import train

        self._train = train
        context = train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()

    def load(self) -> dict[str, Any] | None:
        """The state saved last, or None at the start."""
        checkpoint = self._train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as directory:
            return read_state(Path(directory) / "state.pt")

    def save(self, state: dict[str, Any], metrics: dict[str, float]) -> None:
        """Keep `state`: rank 0 uploads it, every rank reports, as Ray asks."""
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = None
            if self.rank == 0:
                write_state(Path(directory) / "state.pt", state)
                checkpoint = self._train.Checkpoint.from_directory(directory)
            self._train.report(metrics, checkpoint=checkpoint)

    def average_gradients(self, module: nn.Module) -> None:
        """Replace every gradient by its mean over the workers."""
        if self.world_size == 1:
            return
        for parameter in module.parameters():
            if parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.world_size


def fit_on_ray(stage: FitStage, planned: Planned, store: Store, run_id: str, spec: TrainSpec) -> Outcome:
    """The outcome of one fit, run as a Ray Train job whose name holds the unit's key.

    Ray resumes silently by name and path, so a name without the key would continue another fit.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    resources = {"CPU": stage.resources.cpus}
    if stage.resources.gpus:
        resources["GPU"] = stage.resources.gpus
    trainer = TorchTrainer(
        _fit_worker,
        train_loop_config={"stage": stage, "planned": planned, "root": str(store.root), "run_id": run_id},
        scaling_config=ScalingConfig(
            num_workers=stage.workers, use_gpu=stage.resources.gpus > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if stage.resources.gpus else "gloo"),
        run_config=RunConfig(
            name=f"{stage.name}-{planned.unit.id}-{planned.key[:KEY_CHARS_IN_NAMES]}",
            storage_path=str(store.root / RAY_TRAIN_DIRECTORY),
            failure_config=FailureConfig(max_failures=spec.train_max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    log = store.log_path(run_id, stage.name, planned.unit.id)
    log.unlink(missing_ok=True)
    try:
        trainer.fit()
    except TrainingFailedError as error:
        return failed(store, run_id, stage.name, planned.unit.id, error)
    artefact = store.find(stage.name, planned.unit.id, planned.key)
    if artefact is not None:
        return Outcome(planned.unit.id, artefact=artefact)
    message = log.read_text(encoding="utf-8").strip().splitlines()[-1] if log.is_file() else "ended without a result"
    return Outcome(planned.unit.id, error=message, log=log)


def _fit_worker(config: dict[str, Any]) -> None:
    """One worker: rank 0 commits the unit, the others fit beside it into a directory that is thrown away."""
    stage, planned, store = config["stage"], config["planned"], Store(Path(config["root"]))
    context = RayContext()
    runner = UnitRunner(store, config["run_id"], context)
    if context.rank:
        runner.accompany(stage, planned)
        return
    outcome = runner(stage, planned, token=planned.key)
    # Ray Train would start an exception of ours again. A lone worker can end quietly, its log tells; among several
    # the others wait for this one's gradients, so it must fail loudly.
    if outcome.error and context.world_size > 1:
        raise RuntimeError(outcome.error)
