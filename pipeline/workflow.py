"""The whole configuration, and the stages it stands for in the order of the flow."""

import difflib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from pipeline.backbones.open_clip import input_size
from pipeline.config import Resources, Spec, UserPath, load_yaml, parse
from pipeline.data.corruptions import check_corruptions
from pipeline.errors import ConfigError, Faults
from pipeline.executors import Executor, RayExecutor, RaySpec, SerialExecutor, SerialSpec
from pipeline.neighbourhoods.spec import IndexSpec
from pipeline.record import RunRecord
from pipeline.stage import Stage
from pipeline.stages.activations import Activations, ActivationsSpec
from pipeline.stages.baselines import Baselines
from pipeline.stages.corrupt import Corrupt, CorruptSpec
from pipeline.stages.detect import Detect, DetectSpec
from pipeline.stages.edges import Edges
from pipeline.stages.embed import Embed, EmbedSpec
from pipeline.stages.evaluate import Evaluate, EvaluateSpec
from pipeline.stages.export import Export, ExportSpec
from pipeline.stages.fit_head import FitHead, FitHeadSpec
from pipeline.stages.fit_router import FitRouter, FitRouterSpec
from pipeline.stages.import_models import ImportBase, ImportExperts, ImportSpec
from pipeline.stages.index import Index
from pipeline.stages.method_list import BaselinesSpec
from pipeline.stages.neighbours import Neighbours, NeighboursSpec
from pipeline.stages.pairs import Pairs, PairsSpec
from pipeline.stages.radius import FixRadius
from pipeline.stages.report import Report, ReportSpec
from pipeline.stages.score import Score, ScoreSpec
from pipeline.stages.shard import Shard, ShardSpec, TaskSpec
from pipeline.stages.surgery import Surgery
from pipeline.stages.threshold import Threshold, ThresholdSpec
from pipeline.stages.train_models import TrainBase, TrainExperts, TrainSpec
from pipeline.store import Artefact, Store
from pipeline.training.fit_stage import FitStage

MIN_EXPERTS = 2


class TrackingSpec(Spec):
    """Where MLflow keeps the run; None is a local sqlite file in the store."""

    enabled: bool = True
    uri: str | None = None
    experiment: str = "bd-merging"


class Config(Spec):
    """Everything a run can be told. `bd-merge plan CONFIG` shows what follows from it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")
    store: UserPath
    seed: int = Field(default=0, ge=0)
    tasks: tuple[TaskSpec, ...]
    models: Annotated[TrainSpec | ImportSpec, Field(discriminator="kind")]
    shard: ShardSpec = ShardSpec()
    embed: EmbedSpec = EmbedSpec()
    fit_head: FitHeadSpec = FitHeadSpec()
    index: IndexSpec = IndexSpec()
    neighbours: NeighboursSpec = NeighboursSpec()
    score: ScoreSpec = ScoreSpec()
    threshold: ThresholdSpec = ThresholdSpec()
    activations: ActivationsSpec = ActivationsSpec()
    baselines: BaselinesSpec = BaselinesSpec()
    fit_router: FitRouterSpec = FitRouterSpec()
    export: ExportSpec = ExportSpec()
    corrupt: CorruptSpec = CorruptSpec()
    detect: DetectSpec = DetectSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    report: ReportSpec = ReportSpec()
    executor: Annotated[SerialSpec | RaySpec, Field(discriminator="kind")] = RaySpec()
    resources: dict[str, Resources] = Field(default_factory=dict, description="by stage; changes speed, never bytes")
    tracking: TrackingSpec = TrackingSpec()

    @field_validator("store", mode="before")
    @classmethod
    def _on_a_file_system(cls, store: Any) -> Any:
        if "://" in str(store):
            raise ValueError(f"{store}: only paths of a shared file system are supported; mount the bucket")
        return store

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = [*self._task_faults(), *self._expert_faults()]
        stages = [stage.name for stage in STAGES]
        for name in sorted(set(self.resources) - set(stages)):
            faults.append(f"resources.{name}: there is no such stage; {_nearest(name, stages)}")
        if faults:
            raise ValueError("\n  ".join(faults))
        return self

    def _task_faults(self) -> list[str]:
        names = [task.name for task in self.tasks]
        faults = [
            f"tasks.{place}.name: {name!r} is the name of another task too; give each task its own"
            for place, name in enumerate(names)
            if name in names[:place]
        ]
        unseen = self.evaluate.unseen
        faults += [
            f"evaluate.unseen: there is no task {name!r}; {_nearest(name, names)}"
            for name in unseen
            if name not in names
        ]
        n_experts = len(set(names) - set(unseen))
        if n_experts < MIN_EXPERTS:
            beside = f", {len(unseen)} of them unseen" if unseen else ""
            faults.append(
                f"tasks: {len(names)} given{beside}, merging needs at least {MIN_EXPERTS} experts; add a task"
            )
        return faults

    def _expert_faults(self) -> list[str]:
        """Every task but the unseen needs an expert, every expert a task."""
        if not isinstance(self.models, ImportSpec):
            return []
        names, experts = [task.name for task in self.tasks], list(self.models.experts)
        needed = [name for name in dict.fromkeys(names) if name not in self.evaluate.unseen]
        without = [name for name in needed if name not in experts]
        faults = [f"models.experts.{name}: required and missing; every task needs its expert" for name in without]
        for name in experts:
            if name not in names:
                near = _nearest(name, without or names)
                faults.append(f"models.experts.{name}: there is no such task; {near}")
        return faults


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(dict.fromkeys(known))}"


STAGES: tuple[type[Stage], ...] = (
    Shard,
    TrainBase,
    TrainExperts,
    Embed,
    FitHead,
    FixRadius,
    Index,
    Edges,
    Neighbours,
    Score,
    Threshold,
    Pairs,
    Activations,
    Baselines,
    Surgery,
    FitRouter,
    Export,
    Corrupt,
    Evaluate,
    Detect,
    Report,
)

# What changes how a run is carried out and never what comes out of it.
NOT_HASHED = {"store", "executor", "resources", "tracking"}


class Workflow:
    """A checked configuration and its stages."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.name = config.name
        self.store_path = config.store.expanduser().absolute()
        self.timing: list[dict[str, Any]] = []  # filled while it runs, for the report
        self.about: dict[str, Any] = {}  # likewise: which run this is
        self.tracks = config.tracking.enabled
        self._warming: threading.Thread | None = None
        self.stages = self._stages()
        if (
            isinstance(config.executor, RaySpec)
            and config.executor.address != "local"
            and not config.store.is_absolute()
        ):
            raise ConfigError(
                f"store {config.store}: a cluster job runs in a copy of the working directory, so the store must be an "
                "absolute path that every node sees; set BD_STORE or store=/shared/bd-store"
            )

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """The workflow of a configuration file; `ConfigError` names every fault in it."""
        return cls(parse(Config, load_yaml(path, overrides), str(path)))

    def check(self) -> None:
        """Everything that can be found wrong before any work, all at once: `ConfigError` or `DataError` when it is."""
        faults = Faults()
        for _, check in self.checks():
            with faults.collect():
                check()
        faults.raise_any()

    def checks(self) -> list[tuple[str, Callable[[], None]]]:
        """(what, its check) of everything a run depends on."""
        return [
            ("store", Store(self.store_path).check_usable),
            ("resources", self._check_resources),
            ("corruptions", self._check_corruptions),
            *((f"inputs of {s.name}", s.check) for s in self.stages if type(s).check is not Stage.check),
        ]

    def _check_corruptions(self) -> None:
        check_corruptions(self.config.corrupt.corruptions, input_size(self.config.models.model))

    def _check_resources(self) -> None:
        """A local Ray would find it out as late as the stage begins, and a GPU that is missing would pass unsaid."""
        spec = self.config.executor
        if isinstance(spec, RaySpec) and spec.address != "local":
            return
        cpus = self.parallelism
        faults = Faults()
        for stage in self.stages:
            workers = stage.workers if isinstance(stage, FitStage) else 1
            wanted = stage.resources.cpus * workers
            if isinstance(spec, RaySpec) and wanted > cpus:
                of = f" for each of {workers} workers" if workers > 1 else ""
                faults.found.append(
                    ConfigError(
                        f"resources.{stage.name}.cpus: {stage.resources.cpus:g}{of}, the local Ray has {cpus}; lower "
                        "it, or raise executor.cpus"
                    )
                )
            if stage.resources.gpus and not _cuda_devices():
                faults.found.append(
                    ConfigError(f"resources.{stage.name}.gpus: {stage.resources.gpus:g}, no CUDA device is here; set 0")
                )
        faults.raise_any()

    def described(self) -> dict[str, Any]:
        """The whole configuration as plain data."""
        return self.config.model_dump(mode="json")

    def hashed(self) -> dict[str, Any]:
        """The part of the configuration that tells one run from another."""
        return {name: value for name, value in self.described().items() if name not in NOT_HASHED}

    def executor(self, store: Store, run_id: str) -> Executor:
        """The executor that the configuration asks for, started."""
        if isinstance(self.config.executor, SerialSpec):
            return SerialExecutor(store, run_id)
        return RayExecutor(self.config.executor, store, run_id, self.stages)

    @property
    def parallelism(self) -> int:
        """Units that can run at a time; 1 for a cluster, whose size nobody has asked for."""
        spec = self.config.executor
        if isinstance(spec, SerialSpec) or spec.address != "local":
            return 1
        return spec.cpus or os.cpu_count() or 1

    def warm_up_tracking(self) -> None:
        """Ready the tracker beside the run, since MLflow takes seconds to import and to make its tables."""
        if self.tracks:
            from pipeline.tracking import warm_up

            self._warming = threading.Thread(target=warm_up, args=(self.tracking_uri(),), daemon=True)
            self._warming.start()

    def track(self, record: RunRecord, artefacts: Mapping[str, Sequence[Artefact]]) -> str | None:
        """Where the run can be seen in MLflow; None when tracking is off or the tracker is down."""
        if not self.tracks:
            return None
        from pipeline.tracking import track_run

        if self._warming is not None:
            self._warming.join()
        return track_run(record, artefacts, uri=self.tracking_uri(), experiment=self.config.tracking.experiment)

    def tracking_uri(self) -> str:
        """The configured server, or the sqlite file in the store."""
        return self.config.tracking.uri or f"sqlite:///{self.store_path / 'mlflow.db'}"

    def _stages(self) -> list[Stage]:
        config, seed = self.config, self.config.seed
        models = config.models
        base: Stage
        experts: Stage
        unseen = config.evaluate.unseen
        merged = tuple(task for task in config.tasks if task.name not in unseen)
        embed: Stage = Embed(config.embed, self._resources("embed"), unseen=unseen)
        if isinstance(models, TrainSpec):
            base = TrainBase(models, config.tasks, self._resources("base"), seed)
            experts = TrainExperts(models, merged, self._resources("experts"), seed)
            # Experts are long in training: the head is embedded and fitted beside them.
            beside = [embed, experts]
        else:
            base = ImportBase(models, config.tasks, self._resources("base"))
            experts = ImportExperts(models, merged, self._resources("experts"))
            # Imported ones may be refused, which should be known before anything long begins.
            beside = [experts, embed]
        return [
            Shard(config.shard, config.tasks, self._resources("shard")),
            base,
            *beside,
            FitHead(config.fit_head, self._resources("fit_head"), seed),
            FixRadius(config.index, self._resources("radius"), seed),
            Index(config.index, self._resources("index")),
            Edges(config.index, self._resources("edges")),
            Neighbours(config.neighbours, config.index, self._resources("neighbours")),
            Score(config.score, self._resources("score")),
            Threshold(config.threshold, self._resources("threshold")),
            Pairs(PairsSpec(), self._resources("pairs")),
            Activations(
                config.activations,
                self._resources("activations"),
                seed,
                wanted=any(entry.uses_activations for entry in config.baselines.entries()),
            ),
            Baselines(config.baselines, self._resources("baselines"), seed),
            Surgery(config.baselines, self._resources("surgery"), seed),
            FitRouter(config.fit_router, self._resources("fit_router"), seed),
            Export(config.export, self._resources("export")),
            Corrupt(config.corrupt, self._resources("corrupt"), config.corrupt.seed),
            Evaluate(config.evaluate, self._resources("evaluate")),
            Detect(config.detect, config.score, config.index, self._resources("detect")),
            Report(config.report, self._resources("report"), timing=self.timing, about=self.about),
        ]

    def _resources(self, stage: str) -> Resources:
        return self.config.resources.get(stage, Resources())


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count()
