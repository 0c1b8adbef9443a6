"""Runs side by side, from the store alone: accuracy of every method at every level, and the options that differ."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from pipeline.errors import ConfigError, DataError
from pipeline.record import RunRecord
from pipeline.store import Artefact

Artefacts = Mapping[str, Sequence[Artefact]]
CLEAN = "clean"
ORDER = (
    "pretrained",
    "experts",
    "weight_average",
    "task_arithmetic",
    "ties",
    "dare",
    "pcb",
    "model_stock",
    "tsv_m",
    "iso_c",
    "wudi",
    "wudi_exact",
    "ace",
    "doge",
    "regmean",
    "lot",
    "bmm",
    "map",
    "adamerging",
    "surgery",
    "twin_merging",
    "wemoe",
    "bd_task",
    "bd_layer",
    "bd_task_static",
    "bd_layer_static",
)
# Where things lie and how they are carried out: they differ between machines and change no number.
NOT_COMPARED = ("store", "executor", "resources", "tracking", "name")


@dataclass(frozen=True)
class RunRow:
    """One method under one protocol: mean accuracy over the tasks and loss relative to clean, as shares, by level.

    None where no test image has a label.
    """

    model: str
    title: str
    protocol: str
    accuracy: dict[str, float | None]
    relative_drop: dict[str, float | None]
    unseen: dict[str, float | None] = field(default_factory=dict)  # accuracy over tasks that were only evaluated


@dataclass(frozen=True)
class ComparedRow:
    """One method under one protocol: `accuracy[level][i]` of run i, None where that run has no such value."""

    title: str
    protocol: str
    accuracy: dict[str, tuple[float | None, ...]]

    def difference(self, level: str, run: int) -> float | None:
        """Run `run` minus the first; None where either is missing."""
        first, value = self.accuracy[level][0], self.accuracy[level][run]
        return None if first is None or value is None else value - first


@dataclass(frozen=True)
class Comparison:
    """What `compare` prints: `settings` holds the keys whose values differ, one value a run."""

    run_ids: tuple[str, ...]
    rows: tuple[ComparedRow, ...]
    settings: dict[str, tuple[str, ...]]


def run_rows(artefacts: Artefacts) -> list[RunRow]:
    """A row for each evaluated model and protocol: task known before task free, models in display order."""
    read = [_metrics(unit) for unit in artefacts.get("evaluate", ())]
    read.sort(key=lambda metrics: display_order(str(metrics["model"]), metrics["method"]))
    protocols = dict.fromkeys(name for metrics in read for name in metrics["protocols"])
    rows = []
    for protocol in protocols:
        for metrics in read:
            levels = metrics["protocols"].get(protocol)
            if not levels:
                continue
            accuracy = {level: cell["mean"]["accuracy"] for level, cell in levels.items()}
            clean = accuracy.get(CLEAN)
            drop = {level: _drop(clean, value) for level, value in accuracy.items()}
            title = str(metrics.get("title", metrics["model"]))
            apart = {level: cell["mean_unseen"]["accuracy"] for level, cell in levels.items() if "mean_unseen" in cell}
            rows.append(RunRow(str(metrics["model"]), title, protocol, accuracy, drop, apart))
    return rows


def _drop(clean: float | None, value: float | None) -> float | None:
    if clean is None or value is None:
        return None
    return (clean - value) / clean if clean else 0.0


def display_order(model: str, method: str | None = None) -> tuple[int, str]:
    """Sort key: references, baselines, ours. A row of another name stands with its method, or as the last baseline."""
    known = model if model in ORDER else method
    return ORDER.index(known) if known in ORDER else ORDER.index("bd_task") - 1, "" if known == model else model


def compare_runs(runs: Sequence[tuple[RunRecord, Artefacts]]) -> Comparison:
    """Two or more runs by method, protocol and level. `ConfigError` for fewer than two or for a run without results."""
    if len(runs) < 2:
        raise ConfigError(f"{len(runs)} run given, comparing needs at least 2; `bd-merge status` lists them")
    tables: list[dict[tuple[str, str], RunRow]] = []
    for record, artefacts in runs:
        rows = run_rows(artefacts)
        if not rows:
            raise ConfigError(f"run {record.run_id} evaluated no model; finish it with `bd-merge run`, then compare")
        tables.append({(row.protocol, row.model): row for row in rows})
    compared = []
    # The first run's order, then what only later runs have; protocols stay together.
    keys = list(dict.fromkeys(key for table in tables for key in table))
    for protocol in dict.fromkeys(protocol for protocol, _ in keys):
        for key in (key for key in keys if key[0] == protocol):
            found = [table.get(key) for table in tables]
            title = next(row.title for row in found if row is not None)
            levels = dict.fromkeys(level for row in found if row is not None for level in row.accuracy)
            accuracy = {level: tuple(row.accuracy.get(level) if row else None for row in found) for level in levels}
            compared.append(ComparedRow(title, protocol, accuracy))
    ids = tuple(record.run_id for record, _ in runs)
    return Comparison(ids, tuple(compared), differing_settings([record.config for record, _ in runs]))


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """{dotted key: its value in each run} where they are not all equal; a key a run lacks reads `–`."""
    flat = [flatten({k: v for k, v in config.items() if k not in NOT_COMPARED}) for config in configs]
    keys = dict.fromkeys(key for each in flat for key in each)
    values = {key: tuple(each.get(key, "–") for each in flat) for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as {dotted key: compact text}; list entries are numbered."""
    entries: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        entries = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(inner, Mapping | list | tuple) for inner in value):
        entries = [(str(index), inner) for index, inner in enumerate(value)]
    if not entries:
        return {prefix: value if isinstance(value, str) else json.dumps(value, default=str)}
    flat: dict[str, str] = {}
    for key, inner in entries:
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def comparison_table(comparison: Comparison) -> Group:
    """Two tables: accuracy of each method, a line a run (with the difference to the first), and what differs."""
    levels = list(dict.fromkeys(level for row in comparison.rows for level in row.accuracy))
    table = Table(title="mean accuracy over the tasks, % (difference to the first run, points)", title_justify="left")
    for column in ("protocol", "method", "run"):
        table.add_column(column, overflow="fold")
    for level in levels:
        table.add_column(escape(level), justify="right")
    for row in comparison.rows:
        for index, run_id in enumerate(comparison.run_ids):
            # The method's name stands once, before its first run: the eye finds the groups.
            named = ("", "") if index else (row.protocol.replace("_", "-"), row.title)
            cells = (_cell(row, level, index) for level in levels)
            table.add_row(*map(escape, (*named, run_id)), *cells, end_section=index == len(comparison.run_ids) - 1)
    settings = Table(title="settings that differ", title_justify="left")
    for column in ("key", *comparison.run_ids):
        settings.add_column(escape(column), overflow="fold")
    for key, values in comparison.settings.items():
        settings.add_row(*map(escape, (key, *values)))
    return Group(table, settings if comparison.settings else "no setting differs")


def _cell(row: ComparedRow, level: str, run: int) -> str:
    value = row.accuracy.get(level, (None,) * (run + 1))[run]
    if value is None:
        return "–"
    difference = row.difference(level, run) if run else None
    return (
        f"{100 * value:.1f}" if difference is None else f"{100 * value:.1f} ({round(100 * difference, 1) + 0.0:+.1f})"
    )


def _metrics(unit: Artefact) -> dict[str, Any]:
    path = unit.file("metrics.json")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        method = (metrics.get("method") or {}).get("method")
        return {name: metrics[name] for name in ("model", "title", "protocols")} | {"method": method}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not readable as metrics ({error!r}); remove the unit and run again") from error
