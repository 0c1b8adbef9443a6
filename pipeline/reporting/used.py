"""What was used: radius, threshold, diagnostics of the fits, rejected inputs, versions and configuration."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.compare import flatten
from pipeline.reporting.markup import Html, details, join, note, table, tag
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.parts import Parts, numbers_of, read_json, read_table, reference, title_of

Row = tuple[str, str, str]  # what, value, where it was read


def section(parts: Parts, run: Mapping[str, Any], numbers: Numbers) -> Html:
    """Tables of the settings that self-calibrated, of the inputs that were rejected, and of the whole configuration."""
    rows = [*_radius(parts, numbers), *_threshold(parts, numbers), *_fits(parts, numbers)]
    pieces: list[object] = []
    if rows:
        pieces.append(table(["What", "value", "read from"], rows, class_="used"))
    else:
        pieces.append(note("No radius, threshold or fit diagnostics in this run."))
    pieces.append(tag("h3", "Rows in, rows out, rejected"))
    pieces.append(_counts(parts, numbers))
    pieces.append(_rejects(parts, numbers))
    pieces.append(_versions(run))
    config = run.get("config")
    if isinstance(config, Mapping) and config:
        flat = flatten(config)
        pieces.append(
            details(f"Configuration ({len(flat)} keys)", table(["Key", "value"], flat.items(), class_="used"))
        )
    return join(pieces)


def _radius(parts: Parts, numbers: Numbers) -> list[Row]:
    unit = parts.holding("radius", "radius.json")
    if unit is None:
        return []
    decided, where = read_json(unit.path / "radius.json"), reference(unit)
    data = unit.report["metrics"] | decided
    rows: list[Row] = [("radius", str(data.get("mode", "–")), where)]
    rows.append(("search for neighbours", str(data.get("backend", "–")), where))
    labels = {
        "min_cosine": "least cosine of an edge",
        "target_degree": "target degree",
        "isolated_share_sample": "isolated share, calibration sample",
        "n_lists": "lists of the quantiser",
        "n_probes": "lists searched for a sample, at least",
    }
    if data.get("mode") != "adaptive":
        del labels["target_degree"]
    if not data.get("n_lists"):
        del labels["n_lists"], labels["n_probes"]
    return rows + _known(data, labels, "radius", where, numbers)


def _threshold(parts: Parts, numbers: Numbers) -> list[Row]:
    unit = parts.holding("threshold", "epsilon.json")
    if unit is None:
        return []
    data, where = read_json(unit.path / "epsilon.json"), reference(unit)
    labels = {
        "epsilon": "ε, ADS below it makes a positive pair",
        "positive_quantile": "quantile of ADS that gave ε",
        "edges": "edges",
        "positive_share": "share of edges below ε",
    }
    return _known(data, labels, "threshold", where, numbers)


def _known(data: Mapping[str, Any], labels: dict[str, str], prefix: str, where: str, numbers: Numbers) -> list[Row]:
    rows = []
    for key, label in labels.items():
        value = data.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers.add(f"{prefix}.{key}", value, where)
            rows.append((label, short(value), where))
        elif isinstance(value, list):  # one value a task or partition
            rows.append((label, ", ".join(map(str, value)), where))
    return rows


def _fits(parts: Parts, numbers: Numbers) -> list[Row]:
    rows: list[Row] = []
    scored = parts.units("score")
    if scored:
        tables = [read_table(unit.path / "scores.parquet", ("u", "sharpness")) for unit in scored]
        where = parts.group("score")
        u = np.concatenate([numbers_of(t, "u") for t in tables])
        sharp = np.concatenate([numbers_of(t, "sharpness") for t in tables])
        sharp = sharp[np.isfinite(sharp)]
        if len(u):
            numbers.add("score.mean_u", float(u.mean()), where)
            rows.append(("mean uncertainty u of the training samples", short(float(u.mean())), where))
        if len(sharp):
            share = float((sharp < 0).mean())
            numbers.add("score.negative_sharpness_share", share, where)
            rows.append(("share of anchors with negative sharpness (inverts their pairs)", short(share), where))
    for stage in ("fit_head", "fit_router"):
        for unit in parts.units(stage):
            for name, value in sorted((unit.report.get("metrics") or {}).items()):
                numbers.add(f"{stage}.{unit.unit}.{name}", value, reference(unit))
                label = f"{title_of(unit)}, {name.replace('_', ' ')}"
                rows.append((label, short(value), reference(unit)))
    return rows


def _counts(parts: Parts, numbers: Numbers) -> Html:
    rows = []
    for stage in parts.by_stage:
        units = parts.units(stage)
        counts = [sum(int(u.report.get(key) or 0) for u in units) for key in ("rows_in", "rows_out", "rejected")]
        if not units:
            continue
        for key, count in zip(("rows_in", "rows_out", "rejected"), counts, strict=True):
            numbers.add(f"rows.{stage}.{key}", count, parts.group(stage))
        rows.append([stage, f"{len(units):,}", *(f"{count:,}" for count in counts)])
    return table(["Stage", "units", "rows in", "rows out", "rejected"], rows) if rows else note("No stage was read.")


def _rejects(parts: Parts, numbers: Numbers) -> Html:
    reasons: Counter[tuple[str, str]] = Counter()
    for stage in parts.by_stage:
        for unit in parts.units(stage):
            path = unit.path / "rejects.parquet"
            if path.is_file():
                for reason in read_table(path, ("reason",)).column("reason").to_pylist():
                    reasons[stage, reject_kind(str(reason))] += 1
    if not reasons:
        return note("No input was rejected.")
    for (stage, reason), count in reasons.items():
        numbers.add(f"rejects.{stage}.{reason}", count, parts.group(stage))
    rows = [[reason, stage, f"{count:,}"] for (stage, reason), count in reasons.most_common(40)]
    if len(reasons) > 40:
        rest = sum(reasons.values()) - sum(count for _, count in reasons.most_common(40))
        rows.append([f"{len(reasons) - 40} more reasons (all in report.json)", "", f"{rest:,}"])
    return table(["Rejected because", "at stage", "inputs"], rows)


def _versions(run: Mapping[str, Any]) -> Html:
    versions = run.get("versions")
    rows: list[Sequence[object]] = []
    git = run.get("git")
    if git:
        rows.append(("git", str(git)))
    if isinstance(versions, Mapping):
        rows += [(name, str(value)) for name, value in sorted(versions.items())]
    return (
        details("Versions", table(["What", "version"], rows, class_="used")) if rows else note("No versions recorded.")
    )


def reject_kind(reason: str) -> str:
    """The reason without what is particular to one input: `duplicate of a.png` is a `duplicate`."""
    return reason.split(":")[0].split(" of ")[0]


def short(value: float) -> str:
    """Four significant digits, whole numbers grouped."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
