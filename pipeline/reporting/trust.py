"""Uncertainty and ADS, clean against corrupted: distributions, AUROC and isolated shares."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.reporting.gallery import Gallery
from pipeline.reporting.markup import Html, join, note, table
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.parts import Parts, numbers_of, read_json, read_table, reference
from pipeline.reporting.results import CLEAN
from pipeline.reporting.style import Theme, canvas, only_horizontal

SCORES = {"u": "uncertainty u", "iec": "ambiguity IEC ν", "mean_ads": "mean ADS of the sample’s edges"}
SHORT = {"u": "u", "iec": "IEC", "mean_ads": "ADS"}
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Detection:
    """`values[score][level]`, isolated samples left out; `auroc[score][level]` of corrupted against clean."""

    values: dict[str, dict[str, Floats]]
    auroc: dict[str, dict[str, float]]
    isolated: dict[str, float]
    reference: str

    @property
    def levels(self) -> list[str]:
        """Clean first, then as named in the metrics."""
        named = [level for scores in self.auroc.values() for level in scores]
        present = [level for scores in self.values.values() for level in scores]
        return [CLEAN, *dict.fromkeys(level for level in [*named, *sorted(present)] if level != CLEAN)]


def read_detection(parts: Parts) -> Detection | None:
    """The detect stage's files; None when this run has none."""
    units = parts.units("detect")
    if not units:
        return None
    unit = units[0]
    metrics = read_json(unit.path / "metrics.json")
    values: dict[str, dict[str, Floats]] = {}
    if (unit.path / "scores.parquet").is_file():
        scores = read_table(unit.path / "scores.parquet")
        level = np.asarray(scores.column("level").to_pylist(), dtype=object)
        for name in (name for name in SCORES if name in scores.column_names):
            column = numbers_of(scores, name)
            values[name] = {
                str(at): column[(level == at) & np.isfinite(column)] for at in dict.fromkeys(level.tolist())
            }
    auroc = {
        str(score): {str(at): float(v) for at, v in levels.items() if v is not None}
        for score, levels in (metrics.get("auroc") or {}).items()
    }
    isolated = {str(at): float(v) for at, v in (metrics.get("isolated") or {}).items() if v is not None}
    return Detection(values, auroc, isolated, reference(unit))


def section(parts: Parts, gallery: Gallery, numbers: Numbers) -> Html:
    """Distributions as a picture, AUROC as a table."""
    found = read_detection(parts)
    if found is None:
        return note("This run has no detection stage, so uncertainty under corruption was not measured.")
    pieces: list[object] = []
    drawn = [name for name in SCORES if any(len(v) for v in found.values.get(name, {}).values())]
    if drawn:
        pieces.append(
            gallery.add(
                "score_distributions",
                lambda theme: _draw(theme, found, drawn),
                alt="Distributions of uncertainty, ambiguity and ADS on clean and corrupted images",
                caption=_finding(found),
            )
        )
    else:
        pieces.append(note("No per-sample scores were written, so only the AUROC can be shown."))
    for score, levels in found.auroc.items():
        for level, value in levels.items():
            numbers.add(f"auroc.{score}.{level}", value, found.reference)
    for level, share in found.isolated.items():
        numbers.add(f"isolated.{level}", share, found.reference)
    pieces.append(_auroc_table(found))
    return join(pieces)


def _auroc_table(found: Detection) -> Html:
    levels = [level for level in found.levels if level != CLEAN]
    rows: list[list[object]] = [
        [SCORES.get(score, score), "", *(f"{values[at]:.3f}" if at in values else "–" for at in levels)]
        for score, values in found.auroc.items()
    ]
    if found.isolated:
        shares = (f"{100 * found.isolated[at]:.1f} %" if at in found.isolated else "–" for at in [CLEAN, *levels])
        rows.append(["samples without a neighbour", *shares])
    if not rows:
        return note("The detection stage reported no AUROC.")
    return table(["AUROC, corrupted against clean (0.5 is chance)", CLEAN, *levels], rows)


def _finding(found: Detection) -> str:
    best: tuple[float, str, str] | None = None
    for score, levels in found.auroc.items():
        for level, value in levels.items():
            if best is None or value > best[0]:
                best = (value, SCORES.get(score, score), level)
    said = "Each curve is one corruption level, normalised to the same area; samples without a neighbour have no ADS. "
    if best is None:
        return said
    word = "clearly" if best[0] >= 0.8 else "moderately" if best[0] >= 0.65 else "barely"
    return (
        f"{said}The best detector is {best[1]} at {best[2]}: AUROC {best[0]:.2f}, which tells corrupted images {word}."
    )


def _draw(theme: Theme, found: Detection, names: list[str]) -> Figure:
    figure = canvas(3.1)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        _distributions(axes, theme, found, name)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _distributions(axes: Axes, theme: Theme, found: Detection, name: str) -> None:
    everything = np.concatenate(list(found.values[name].values()))
    low, high = (float(v) for v in np.percentile(everything, [0.5, 99.5]))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    smallest = min(len(values) for values in found.values[name].values() if len(values))
    edges = np.linspace(low, high, 1 + int(np.clip(smallest**0.5, 12, 40)))
    for index, level in enumerate(level for level in found.levels if level in found.values[name]):
        values = found.values[name][level]
        if len(values) == 0:
            continue
        # Tails past the shown range count in the outermost bins: no sample is dropped from the picture.
        counts, _ = np.histogram(np.clip(values, low, high), bins=edges)
        density = counts / len(values) * 100
        colour = theme.level(index)
        axes.stairs(density, edges, color=colour, linewidth=1.8, label=level, fill=False)
        if level == CLEAN:
            axes.stairs(density, edges, color=colour, alpha=0.22, fill=True)
    score = found.auroc.get(name, {})
    hardest = next((level for level in reversed(found.levels) if level in score), None)
    axes.set_title(f"{SHORT[name]}: share of samples (%)")
    axes.set_xlabel(SCORES[name] if hardest is None else f"{SCORES[name]}\nAUROC {hardest}: {score[hardest]:.2f}")
    axes.locator_params(axis="x", nbins=5)
    only_horizontal(axes)
