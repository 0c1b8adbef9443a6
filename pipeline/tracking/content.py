"""What MLflow is told of a run: plain data, made from the run record and the store, without MLflow."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.compare import flatten, run_rows
from pipeline.costs import Cost, read_costs
from pipeline.record import RunRecord
from pipeline.store import Artefact, Manifest

FITTED = ("base", "experts", "fit_head", "baselines", "surgery", "fit_router")
CURVE_POINTS = 200
POSITION = ("step", "epoch")
PARAM_KEY_CHARS, PARAM_VALUE_CHARS = 250, 6000  # MLflow refuses more
RUN_TAG, CHILD_TAG, KEY_TAG = "bd.run_id", "bd.child", "bd.key"

Artefacts = Mapping[str, Sequence[Artefact]]


@dataclass(frozen=True)
class Point:
    """One value of one metric."""

    name: str
    value: float
    step: int = 0


@dataclass(frozen=True)
class TrackedRun:
    """One MLflow run. `files` are (path, folder among its artifacts); `child` is empty for the parent."""

    child: str
    title: str
    params: dict[str, str]
    tags: dict[str, str]
    points: list[Point]
    files: list[tuple[Path, str]] = field(default_factory=list)


def tracked_runs(record: RunRecord, artefacts: Artefacts) -> Iterator[TrackedRun]:
    """The parent first, then a child for each fitted unit and each evaluated model."""
    yield _parent(record, artefacts)
    for stage in FITTED:
        for unit in artefacts.get(stage, ()):
            histories = sorted(unit.path.glob("*history.parquet"))
            # Stages that only convert what the user gave leave no history: nothing was trained there.
            if histories:
                curves = [point for path in histories for point in _curve(path)]
                yield _child(unit, f"{stage} {unit.unit}", curves, [])
    costs = read_costs(artefacts)
    for unit in artefacts.get("evaluate", ()):
        points = [*_results({"evaluate": [unit]}), *_cost(costs.get(unit.unit))]
        yield _child(unit, f"evaluate {unit.unit}", points, [(unit.file("metrics.json"), "")], _method(unit))


def span_ms(record: RunRecord) -> tuple[int, int]:
    """When the run began and ended, in milliseconds since 1970, from its record: tracking again writes equal times."""
    began = _milliseconds(record.created)
    return began, max(began, _milliseconds(record.finished)) if record.finished else began


def metric_name(*parts: str) -> str:
    """The parts joined by `/`, with every character that MLflow refuses replaced by `_`."""
    return "/".join(re.sub(r"[^\w\-. ]", "_", part).strip(". ") or "_" for part in parts)


def params_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Flattened settings within MLflow's limits; a value that was cut ends in an ellipsis."""
    flat = {}
    for key, value in flatten(settings).items():
        name = re.sub(r"[^\w\-. /]", "_", key)[:PARAM_KEY_CHARS]
        if name:
            flat[name] = value if len(value) <= PARAM_VALUE_CHARS else value[: PARAM_VALUE_CHARS - 1] + "…"
    return flat


def _parent(record: RunRecord, artefacts: Artefacts) -> TrackedRun:
    tags = {"bd.git": record.git, **{f"bd.version.{name}": value for name, value in record.versions.items()}}
    for stage, units in record.stages.items():
        # One tag a stage; a stage of very many shards would pass the limit of a tag's length.
        tags[f"bd.keys.{stage}"] = " ".join(f"{unit}-{key[:12]}" for unit, key in units.items())[:PARAM_VALUE_CHARS]
    points = _results(artefacts, by_model=True)
    for entry in record.timing:
        for name in ("wall_s", "busy_s", "bytes"):
            if isinstance(entry.get(name), int | float):
                points.append(Point(metric_name("time", str(entry["stage"]), name), float(entry[name])))
    files = []
    for report in artefacts.get("report", ()):
        files.append((report.file("report.html"), ""))
        files += [(path, "figures") for path in sorted(report.file("figures").glob("*.png"))]
    return TrackedRun("", record.run_id, params_of(record.config), tags, _finite(points), files)


def _method(unit: Artefact) -> dict[str, Any]:
    """The method that was evaluated, with its parameters and need; empty for a reference."""
    metrics = json.loads(unit.file("metrics.json").read_text(encoding="utf-8"))
    return {**(metrics.get("method") or {}), **{f"cost.{k}": v for k, v in (metrics.get("cost") or {}).items()}}


def _cost(cost: Cost | None) -> list[Point]:
    """What the method took, as the report's table has it."""
    if cost is None:
        return []
    measured = {"seconds": cost.seconds, "memory_bytes": cost.memory_bytes, "price": cost.price}
    return [Point(metric_name("cost", name), value) for name, value in measured.items() if value is not None]


def _child(
    unit: Artefact,
    title: str,
    points: list[Point],
    files: list[tuple[Path, str]],
    told: Mapping[str, Any] | None = None,
) -> TrackedRun:
    manifest = Manifest.read(unit.path)
    report = [Point(metric_name(name), float(value)) for name, value in (unit.report.get("metrics") or {}).items()]
    spans = [
        Point(metric_name("time", name), float(value)) for name, value in (unit.report.get("seconds") or {}).items()
    ]
    known = {**manifest.spec, **manifest.settings, "seed": manifest.seed, "version": manifest.version}
    params = params_of({**known, **(told or {})})
    tags = {KEY_TAG: unit.key, "bd.stage": unit.stage, "bd.unit": unit.unit, "bd.digest": unit.digest}
    return TrackedRun(f"{unit.stage}/{unit.unit}", title, params, tags, _finite([*report, *spans, *points]), files)


def _results(artefacts: Artefacts, by_model: bool = False) -> list[Point]:
    """`<protocol>/<level>/accuracy` (below the model's name for the parent), with relative drop."""
    points = []
    for row in run_rows(artefacts):
        head = (row.model, row.protocol) if by_model else (row.protocol,)
        for level, accuracy in row.accuracy.items():
            for name, value in (("accuracy", accuracy), ("relative_drop", row.relative_drop[level])):
                if value is not None:
                    points.append(Point(metric_name(*head, level, name), value))
        for level, value in row.unseen.items():
            if value is not None:
                points.append(Point(metric_name(*head, level, "unseen_accuracy"), value))
    return points


def _curve(path: Path) -> list[Point]:
    """Each column of a history against its step, thinned to `CURVE_POINTS` that hold both ends."""
    columns = pq.read_table(path).to_pydict()
    axis = next((columns[name] for name in POSITION if name in columns), None)
    terms = {n: v for n, v in columns.items() if n not in POSITION and v and isinstance(v[0], int | float)}
    count = len(next(iter(terms.values()), []))
    kept = sorted({round(i * (count - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)}) if count else []
    prefix = path.name.removesuffix("history.parquet").rstrip("_.")
    return [
        Point(metric_name(*filter(None, ["loss", prefix, name])), float(values[i]), int(axis[i]) if axis else i)
        for name, values in terms.items()
        for i in kept
        if values[i] is not None
    ]


def _finite(points: list[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point.value)]


def _milliseconds(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp() * 1000)
