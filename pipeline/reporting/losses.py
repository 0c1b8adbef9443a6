"""Loss curves of everything that was fitted: demo models, head, AdaMerging, routers."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from pipeline.reporting.gallery import Gallery
from pipeline.reporting.markup import Html, note
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.parts import Parts, numbers_of, read_table, reference, title_of
from pipeline.reporting.style import Theme, canvas, only_horizontal

STAGES = ("base", "experts", "fit_head", "baselines", "surgery", "fit_router")
POSITION = ("step", "epoch")
COUNTS = ("anchors",)  # kept in the history beside the losses, and on another scale
MOST_PANELS = 18
COLUMNS = 3
LABEL_GAP = 0.1  # of the panel's height
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class History:
    """One fitted unit: `terms` are its loss columns by step."""

    title: str
    position: Floats
    terms: dict[str, Floats]
    axis: str
    reference: str


def read_histories(parts: Parts) -> list[History]:
    """Every `history.parquet` of a fitting stage, in the order things are fitted; constant or empty ones too."""
    found = []
    for stage in STAGES:
        for unit in parts.units(stage):
            for path in sorted(unit.path.glob("*history.parquet")):
                table = read_table(path)
                axis = next((name for name in POSITION if name in table.column_names), None)
                terms = {
                    name: numbers_of(table, name)
                    for name in table.column_names
                    if name not in (*POSITION, *COUNTS) and _is_number(table.schema.field(name).type)
                }
                if table.num_rows == 0 or not terms:
                    continue
                extra = path.name.removesuffix("history.parquet").rstrip("_.")
                title = f"{title_of(unit)} {extra}".rstrip()
                position = numbers_of(table, axis) if axis else np.arange(table.num_rows, dtype=np.float64)
                found.append(History(title, position, terms, axis or "row", reference(unit)))
    return found


def section(parts: Parts, gallery: Gallery, numbers: Numbers) -> Html:
    """Small multiples, one panel a fitted unit."""
    histories = read_histories(parts)
    if not histories:
        return note("No fitting stage of this run left a history, so there are no loss curves.")
    for history in histories:
        for term, values in history.terms.items():
            numbers.add(f"loss.{history.title}.{term}.first", float(values[0]), history.reference)
            numbers.add(f"loss.{history.title}.{term}.last", float(values[-1]), history.reference)
    shown = histories[:MOST_PANELS]
    caption = f"{len(histories)} fitted parts; pale lines are the raw values, strong ones a running mean. "
    caption += "A panel whose terms differ by more than tenfold has a logarithmic axis."
    if len(shown) < len(histories):
        caption += f" The first {MOST_PANELS} are drawn; report.json has the ends of all."
    return gallery.add(
        "loss_curves", lambda theme: _draw(theme, shown), alt="Loss curves of every fitted part", caption=caption
    )


def _draw(theme: Theme, histories: list[History]) -> Figure:
    columns = min(COLUMNS, len(histories))
    rows = -(-len(histories) // columns)
    figure = canvas(0.3 + 2.25 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, history in zip(panels.flat, histories, strict=False):
        _panel(axes, theme, history)
    for axes in panels.flat[len(histories) :]:
        axes.set_visible(False)
    return figure


def _panel(axes: Axes, theme: Theme, history: History) -> None:
    colours = [theme.blue, theme.orange, theme.green, theme.pink, theme.red, theme.sky, theme.yellow, theme.grey]
    few = len(history.position) < 30
    for index, (term, values) in enumerate(history.terms.items()):
        colour = colours[index % len(colours)]
        axes.plot(history.position, values, color=colour, linewidth=0.8, alpha=1.0 if few else 0.28,
                  marker="o" if few else "", markersize=2.5)  # fmt: skip
        axes.plot(*_running_mean(history.position, values), color=colour, linewidth=1.7, label=term)
    everything = np.concatenate(list(history.terms.values()))
    sizes = [abs(float(np.nanmedian(v))) for v in history.terms.values() if np.isfinite(v).any()]
    positive = bool((everything[np.isfinite(everything)] > 0).all())
    if positive and sizes and max(sizes) > 10 * max(min(sizes), 1e-12):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(history.title, fontsize=9, pad=5)
    axes.set_xlabel(history.axis, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    only_horizontal(axes)
    _name_ends(
        axes, {term: (colours[i % len(colours)], values) for i, (term, values) in enumerate(history.terms.items())}
    )


def _name_ends(axes: Axes, curves: dict[str, tuple[str, Floats]]) -> None:
    """Write each term beside the end of its curve, moved apart where ends meet: nothing to look up in a legend."""
    ends = {}
    for term, (_, values) in curves.items():
        last = _running_mean(values, values)[1][-1]
        if np.isfinite(last):
            point = axes.transData.transform((axes.get_xlim()[1], last))
            ends[term] = float(axes.transAxes.inverted().transform(point)[1])
    order = sorted(ends, key=lambda term: ends[term])
    for below, above in pairwise(order):
        ends[above] = max(ends[above], ends[below] + LABEL_GAP)
    shift = max(0.0, max(ends.values(), default=0.0) - 1.0)
    for term in order:
        axes.text(1.02, ends[term] - shift, term, transform=axes.transAxes, color=curves[term][0], fontsize=7.5,
                  va="center", clip_on=False)  # fmt: skip


def _running_mean(position: Floats, values: Floats) -> tuple[Floats, Floats]:
    width = max(1, len(values) // 25)
    if width == 1:
        return position, values
    kernel = np.ones(width) / width
    # Only whole windows: a zero-padded end would bend the curve towards zero.
    return np.convolve(position, kernel, mode="valid"), np.convolve(values, kernel, mode="valid")


def _is_number(kind: Any) -> bool:
    return str(kind).startswith(("float", "double", "halffloat", "int", "uint"))
