"""Runs side by side, from the store alone: accuracy of every method at every level, and the options that differ."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from pipeline.errors import ConfigError, DataError
from pipeline.record import RunRecord
from pipeline.store import Artefact

Artefacts = Mapping[str, Sequence[Artefact]]
CLEAN = "clean"
# Where things lie and how they are carried out: they differ between machines and change no number.
NOT_COMPARED = ("store", "executor", "resources", "tracking", "name")


@dataclass(frozen=True)
class RunRow:
    """One method under one protocol: mean accuracy over the tasks and loss relative to clean, as shares, by level."""

    model: str
    title: str
    protocol: str
    accuracy: dict[str, float]
    relative_drop: dict[str, float]


@dataclass(frozen=True)
class ComparedRow:
    """One method under one protocol at one level: `accuracy[i]` of run i, None where that run has no such value."""

    title: str
    protocol: str
    level: str
    accuracy: tuple[float | None, ...]

    @property
    def differences(self) -> tuple[float | None, ...]:
        """Each run minus the first; None where either is missing."""
        first = self.accuracy[0]
        return tuple(None if value is None or first is None else value - first for value in self.accuracy)


@dataclass(frozen=True)
class Comparison:
    """What `compare` prints: `settings` holds the keys whose values differ, one value a run."""

    run_ids: tuple[str, ...]
    rows: tuple[ComparedRow, ...]
    settings: dict[str, tuple[str, ...]]


def run_rows(artefacts: Artefacts) -> list[RunRow]:
    """A row for each evaluated model and protocol: task known before task free, models in the order pinned."""
    read = [_metrics(unit) for unit in artefacts.get("evaluate", ())]
    protocols = dict.fromkeys(name for metrics in read for name in metrics["protocols"])
    rows = []
    for protocol in protocols:
        for metrics in read:
            levels = metrics["protocols"].get(protocol)
            if not levels:
                continue
            accuracy = {level: float(cell["mean"]["accuracy"]) for level, cell in levels.items()}
            clean = accuracy.get(CLEAN, 0.0)
            drop = {level: (clean - value) / clean if clean else 0.0 for level, value in accuracy.items()}
            title = str(metrics.get("title", metrics["model"]))
            rows.append(RunRow(str(metrics["model"]), title, protocol, accuracy, drop))
    return rows


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
            for level in dict.fromkeys(level for row in found if row is not None for level in row.accuracy):
                values = tuple(row.accuracy.get(level) if row is not None else None for row in found)
                compared.append(ComparedRow(title, protocol, level, values))
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


def comparison_table(comparison: Comparison) -> Table:
    """One table: accuracy in %, difference to the first run in points, and below them the settings that differ."""
    table = Table(title="mean accuracy over the tasks, % (difference to the first run, points)", title_justify="left")
    for column in ("protocol", "method", "level"):
        table.add_column(column, overflow="fold")
    for run_id in comparison.run_ids:
        table.add_column(run_id, justify="right", overflow="fold")
    previous = ("", "")
    for row in comparison.rows:
        here = (row.protocol, row.title)
        if previous[0] and here[0] != previous[0]:
            table.add_section()
        # A method's name once, over its levels: the eye finds the groups.
        named = ("", "") if here == previous else (row.protocol.replace("_", "-"), row.title)
        table.add_row(*named, row.level, *_cells(row))
        previous = here
    table.add_section()
    for key, values in comparison.settings.items():
        table.add_row("setting", key, "", *values)
    if not comparison.settings:
        table.add_row("setting", "none differs", "", *("" for _ in comparison.run_ids))
    return table


def _cells(row: ComparedRow) -> list[str]:
    cells = []
    for index, (value, difference) in enumerate(zip(row.accuracy, row.differences, strict=True)):
        if value is None:
            cells.append("–")
        elif index == 0 or difference is None:
            cells.append(f"{100 * value:.1f}")
        else:
            cells.append(f"{100 * value:.1f} ({100 * difference:+.1f})")
    return cells


def _metrics(unit: Artefact) -> dict[str, Any]:
    path = unit.file("metrics.json")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        return {"model": metrics["model"], "title": metrics["title"], "protocols": metrics["protocols"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not readable as metrics ({error!r}); remove the unit and run again") from error
