"""The Ray Train job around a fit: workers, failures, checkpoints. The mathematics stays in the plain loop."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback, WorkerGroupCallback
from torch import nn

from pipeline import logs
from pipeline.executors.unit import Outcome, Planned, UnitRunner, failed
from pipeline.store import Store
from pipeline.store.keys import KEY_CHARS_IN_NAMES
from pipeline.training.context import read_state, write_state
from pipeline.training.fit_stage import FitStage

RAY_TRAIN_DIRECTORY = ".ray_train"
FAILURE = "failure.json"


class PeerLost(BaseException):
    """Another worker of the job ended. No failure of this fit, so no `except Exception` may take it for one."""


class RayContext:
    """A worker of a Ray Train job; its state goes where Ray keeps checkpoints."""

    def __init__(self, directory: Path) -> None:
        """`directory` is the job's own, on a file system that every node sees."""
        context = train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.ranks: Sequence[int] = (self.rank,)
        self._directory = directory

    def load(self) -> dict[str, Any] | None:
        """The state saved last, or None at the start."""
        checkpoint = train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as directory:
            return read_state(Path(directory) / "state.pt")

    def save(self, state: dict[str, Any], metrics: dict[str, float]) -> None:
        """Keep `state`: rank 0 uploads it, every rank reports, as Ray asks."""
        if self.rank:
            train.report(metrics)
            return
        # Below the job's directory: what a killed worker leaves there goes when the fit has ended.
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            write_state(Path(directory) / "state.pt", state)
            train.report(metrics, checkpoint=train.Checkpoint.from_directory(directory))

    def average_gradients(self, module: nn.Module) -> None:
        """Replace every gradient by its mean over the workers, added in the order of their ranks."""
        if self.world_size == 1:
            return
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        own = torch.cat([gradient.flatten() for gradient in gradients])
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        try:
            # Gathered and not reduced: a ring adds in an order of its own, which would change the last bits.
            torch.distributed.all_gather(parts, own)
        except RuntimeError as error:
            raise PeerLost(f"worker {self.rank} waited for gradients: {error}") from error
        total = parts[0]
        for part in parts[1:]:
            total += part
        total /= self.world_size
        for gradient, mean in zip(gradients, torch.split(total, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


class WithoutDatasets(WorkerGroupCallback):
    """In the place of Ray Data's callback, which starts an actor for data sets that a fit never has."""

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[None]]:
        """No shard of a data set for any worker."""
        return {"dataset_shard_provider": [None] * len(workers)}


class LeanTrainer(TorchTrainer):
    """A TorchTrainer that starts no actors beside its controller, its barrier and its workers.

    Each costs two to three seconds of a CPU. The cleaner of placement groups is for drivers that outlive a lost
    controller; here a placement group ends with the run.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        dropped = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [*(each for each in callbacks if not isinstance(each, dropped)), WithoutDatasets()]


def fit_on_ray(stage: FitStage, planned: Planned, store: Store, run_id: str, max_failures: int) -> Outcome:
    """The outcome of one fit, run as a Ray Train job whose name holds the unit's key.

    Ray resumes silently by name and path, so a name without the key would continue another fit. The job's directory is
    removed when its unit is committed.
    """
    name = f"{stage.name}-{planned.unit.id}-{planned.key[:KEY_CHARS_IN_NAMES]}"
    storage = store.root / RAY_TRAIN_DIRECTORY
    directory = storage / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FAILURE).unlink(missing_ok=True)
    resources = {"CPU": stage.resources.cpus}
    if stage.resources.gpus:
        resources["GPU"] = stage.resources.gpus
    trainer = LeanTrainer(
        _fit_worker,
        train_loop_config={"stage": stage, "planned": planned, "root": store.root, "run_id": run_id, "name": name},
        scaling_config=train.ScalingConfig(
            num_workers=stage.workers, use_gpu=stage.resources.gpus > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if stage.resources.gpus else "gloo"),
        run_config=train.RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=train.FailureConfig(max_failures=max_failures),
            checkpoint_config=train.CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        outcome = trainer.fit().return_value
    except train.TrainingFailedError as error:
        return failed(store, run_id, stage.name, planned.unit.id, error)
    assert isinstance(outcome, Outcome)
    if outcome.artefact is not None:
        shutil.rmtree(directory, ignore_errors=True)
    return outcome


def _fit_worker(config: dict[str, Any]) -> Outcome | None:
    """One worker: rank 0 commits the unit, the others fit beside it into a directory that is thrown away.

    Ray Train starts a job again when a worker raised, and an exception of ours must not be tried again. A lone worker
    therefore returns its failure. Of several, the failed one leaves a note and raises, which frees those that wait for
    it; when they are started again, the note ends them.
    """
    stage, planned, store = config["stage"], config["planned"], Store(config["root"])
    logs.configure()
    directory = store.root / RAY_TRAIN_DIRECTORY / config["name"]
    note = directory / FAILURE
    if note.is_file():
        noted = json.loads(note.read_text(encoding="utf-8"))
        return Outcome(**noted | {"log": Path(noted["log"]) if noted["log"] else None})
    context = RayContext(directory)
    runner = UnitRunner(store, config["run_id"], context)
    try:
        outcome = runner(stage, planned, token=planned.key) if context.rank == 0 else runner.accompany(stage, planned)
    except PeerLost as lost:
        raise RuntimeError(str(lost)) from lost
    if outcome is None or outcome.artefact is not None or context.world_size == 1:
        return outcome
    note.write_text(json.dumps(asdict(outcome), default=str), encoding="utf-8")
    raise RuntimeError(outcome.error)
