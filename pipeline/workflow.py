"""The whole configuration, and the stages it stands for in the order of the flow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from pipeline.config import Resources, Spec, load_yaml, parse
from pipeline.errors import ConfigError
from pipeline.executors import Executor, RayExecutor, RaySpec, SerialExecutor, SerialSpec
from pipeline.record import RunRecord
from pipeline.stage import Stage
from pipeline.stages.corrupt import Corrupt, CorruptSpec
from pipeline.stages.detect import Detect, DetectSpec
from pipeline.stages.embed import Embed, EmbedSpec
from pipeline.stages.evaluate import Evaluate, EvaluateSpec
from pipeline.stages.export import Export, ExportSpec
from pipeline.stages.fit_head import FitHead, FitHeadSpec
from pipeline.stages.fit_router import FitRouter, FitRouterSpec
from pipeline.stages.import_models import ImportBase, ImportExperts, ImportSpec
from pipeline.stages.index import Index, IndexSpec
from pipeline.stages.neighbours import Neighbours, NeighboursSpec
from pipeline.stages.pairs import Pairs, PairsSpec
from pipeline.stages.report import Report, ReportSpec
from pipeline.stages.score import Score, ScoreSpec
from pipeline.stages.shard import Shard, ShardSpec, TaskSpec
from pipeline.stages.threshold import Threshold, ThresholdSpec
from pipeline.stages.train_models import TrainBase, TrainExperts, TrainSpec
from pipeline.store import Artefact, Store

MIN_EXPERTS = 2


class TrackingSpec(Spec):
    """Where MLflow keeps the run; None is a local sqlite file in the store."""

    enabled: bool = True
    uri: str | None = None
    experiment: str = "bd-merging"


class Config(Spec):
    """Everything a run can be told. `bd-merge plan CONFIG` shows what follows from it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")
    store: Path
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
    fit_router: FitRouterSpec = FitRouterSpec()
    export: ExportSpec = ExportSpec()
    corrupt: CorruptSpec = CorruptSpec()
    detect: DetectSpec = DetectSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    report: ReportSpec = ReportSpec()
    executor: Annotated[SerialSpec | RaySpec, Field(discriminator="kind")] = RaySpec()
    resources: dict[str, Resources] = Field(default_factory=dict, description="by stage; changes speed, never bytes")
    tracking: TrackingSpec = TrackingSpec()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [task.name for task in self.tasks]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"tasks: names repeat: {', '.join(repeated)}; give each task its own")
        if len(names) < MIN_EXPERTS:
            raise ValueError(f"tasks: {len(names)} given, merging needs at least {MIN_EXPERTS} experts; add a task")
        if isinstance(self.models, ImportSpec) and set(self.models.experts) != set(names):
            raise ValueError(
                f"models.experts names {sorted(self.models.experts)}, tasks names {sorted(names)}; one expert a task"
            )
        unknown = sorted(set(self.resources) - {stage.name for stage in STAGES})
        if unknown:
            raise ValueError(f"resources: no stage is called {unknown[0]!r}; there are {[s.name for s in STAGES]}")
        return self


STAGES: tuple[type[Stage], ...] = (
    Shard,
    TrainBase,
    TrainExperts,
    Embed,
    FitHead,
    Index,
    Neighbours,
    Score,
    Threshold,
    Pairs,
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
        """Everything that can be found wrong before any work: `ConfigError` or `DataError` when it is."""
        for stage in self.stages:
            stage.check()

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
        return RayExecutor(self.config.executor, store, run_id)

    def track(self, record: RunRecord, artefacts: Mapping[str, Sequence[Artefact]]) -> str | None:
        """Where the run can be seen in MLflow; None when tracking is off or the tracker is down."""
        if not self.tracks:
            return None
        from pipeline.tracking import track_run

        return track_run(record, artefacts, uri=self.tracking_uri(), experiment=self.config.tracking.experiment)

    def tracking_uri(self) -> str:
        """The configured server, or the sqlite file in the store."""
        return self.config.tracking.uri or f"sqlite:///{self.store_path / 'mlflow.db'}"

    def _stages(self) -> list[Stage]:
        config, seed = self.config, self.config.seed
        models = config.models
        base: Stage
        experts: Stage
        if isinstance(models, TrainSpec):
            base = TrainBase(models, config.tasks, self._resources("base"), seed)
            experts = TrainExperts(models, config.tasks, self._resources("experts"), seed)
        else:
            base = ImportBase(models, config.tasks, self._resources("base"))
            experts = ImportExperts(models, config.tasks, self._resources("experts"))
        return [
            Shard(config.shard, config.tasks, self._resources("shard")),
            base,
            experts,
            Embed(config.embed, self._resources("embed")),
            FitHead(config.fit_head, self._resources("fit_head"), seed),
            Index(config.index, self._resources("index"), seed),
            Neighbours(config.neighbours, self._resources("neighbours")),
            Score(config.score, self._resources("score")),
            Threshold(config.threshold, self._resources("threshold")),
            Pairs(PairsSpec(), self._resources("pairs")),
            FitRouter(config.fit_router, self._resources("fit_router"), seed),
            Export(config.export, self._resources("export"), seed),
            Corrupt(config.corrupt, self._resources("corrupt"), config.corrupt.seed),
            Evaluate(config.evaluate, self._resources("evaluate")),
            Detect(config.detect, config.score, self._resources("detect")),
            Report(config.report, self._resources("report"), timing=self.timing, about=self.about),
        ]

    def _resources(self, stage: str) -> Resources:
        return self.config.resources.get(stage, Resources())
