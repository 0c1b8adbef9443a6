"""What `evaluate` measured, typed: one model a row, by protocol, corruption level and task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.compare import display_order
from pipeline.reporting.parts import Parts, read_json, reference

REFERENCES = ("pretrained", "experts")
PROTOCOLS = {"task_known": "task known", "task_free": "task free"}
CLEAN = "clean"


@dataclass(frozen=True)
class ModelResult:
    """One evaluated model; every figure is None where the model has no such protocol, level or task."""

    name: str
    title: str
    tasks: tuple[str, ...]
    levels: tuple[str, ...]
    protocols: Mapping[str, Mapping[str, Any] | None]
    reliability: Mapping[str, Any]
    router: Mapping[str, Any] | None
    cost: Mapping[str, Any]
    reference: str
    against_dense: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)  # {protocol: {level: share}}
    method: Mapping[str, Any] | None = None  # name, parameters, need; None for a reference
    unseen: tuple[str, ...] = ()  # tasks whose experts are not merged; no mean but their own counts them

    @property
    def ours(self) -> bool:
        """Whether this is a form of BD-Merging."""
        return self.name.startswith("bd_")

    @property
    def is_reference(self) -> bool:
        """Whether this row is a bound to read the others against, not a merging method."""
        return self.name in REFERENCES

    def mean(self, protocol: str, level: str, metric: str = "accuracy") -> float | None:
        """Mean over the tasks, as a share in [0, 1]."""
        cell = (self.protocols.get(protocol) or {}).get(level) or {}
        return _number((cell.get("mean") or {}).get(metric))

    def task(self, protocol: str, level: str, task: str, metric: str = "accuracy") -> float | None:
        """One task, as a share in [0, 1]."""
        cell = (self.protocols.get(protocol) or {}).get(level) or {}
        return _number(((cell.get("tasks") or {}).get(task) or {}).get(metric))

    def corrupted(self, protocol: str, metric: str = "accuracy", task: str | None = None) -> float | None:
        """Mean over every level but clean (of the task mean, or of one task)."""
        return mean_or_none(
            [
                self.mean(protocol, level, metric) if task is None else self.task(protocol, level, task, metric)
                for level in self.levels
                if level != CLEAN
            ]
        )

    def over(self, protocol: str, level: str | None, *, unseen: bool) -> float | None:
        """Mean accuracy over the seen or the unseen tasks, at one level or over the corrupted ones."""
        which = "mean_unseen" if unseen else "mean"
        levels = [each for each in self.levels if each != CLEAN] if level is None else [level]
        cells = [(self.protocols.get(protocol) or {}).get(each) or {} for each in levels]
        return mean_or_none([_number((cell.get(which) or {}).get("accuracy")) for cell in cells])

    def drop(self, protocol: str, level: str) -> float | None:
        """(accuracy − clean accuracy) / clean accuracy: negative where accuracy was lost."""
        clean, shifted = self.mean(protocol, CLEAN), self.mean(protocol, level)
        return None if clean is None or shifted is None or clean == 0 else (shifted - clean) / clean


@dataclass(frozen=True)
class Results:
    """All evaluated models, references first, then baselines, then ours."""

    models: tuple[ModelResult, ...]

    @property
    def levels(self) -> tuple[str, ...]:
        """Corruption levels in the order measured."""
        return max((model.levels for model in self.models), key=len, default=())

    @property
    def corruptions(self) -> str:
        """`L1–L3`: the name of the corrupted mean."""
        names = [level for level in self.levels if level != CLEAN]
        return f"{names[0]}–{names[-1]}" if len(names) > 1 else "".join(names)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in the order measured."""
        return max((model.tasks for model in self.models), key=len, default=())

    @property
    def unseen(self) -> tuple[str, ...]:
        """Tasks that were only evaluated."""
        return next((model.unseen for model in self.models), ())

    @property
    def contenders(self) -> tuple[ModelResult, ...]:
        """The merging methods: every model that is not a reference row."""
        return tuple(model for model in self.models if not model.is_reference)

    def get(self, name: str) -> ModelResult | None:
        """One model by name."""
        return next((model for model in self.models if model.name == name), None)


def read_results(parts: Parts) -> Results:
    """Every `metrics.json` of the evaluate stage, in display order."""
    models = []
    for unit in parts.units("evaluate"):
        data = read_json(unit.path / "metrics.json")
        name = str(data.get("model", unit.unit))
        models.append(
            ModelResult(
                name=name,
                title=str(data.get("title", name)),
                tasks=tuple(map(str, data.get("tasks", ()))),
                levels=tuple(map(str, data.get("levels", ()))),
                protocols=data.get("protocols") or {},
                reliability=data.get("reliability") or {},
                router=data.get("router"),
                cost=data.get("cost") or {},
                reference=reference(unit),
                against_dense=data.get("compared_with_dense") or {},
                method=data.get("method"),
                unseen=tuple(map(str, data.get("unseen") or ())),
            )
        )
    return Results(tuple(sorted(models, key=lambda m: display_order(m.name, (m.method or {}).get("method")))))


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """Mean of the values that exist; None when none does."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def best_of(models: Sequence[ModelResult], protocol: str, level: str | None) -> ModelResult | None:
    """The most accurate model at one level, or over the corrupted levels when `level` is None."""

    def score(model: ModelResult) -> float:
        value = model.corrupted(protocol) if level is None else model.mean(protocol, level)
        return -1.0 if value is None else value

    best = max(models, key=score, default=None)
    return best if best is not None and score(best) >= 0 else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and value == value else None
