"""Whether confidence can be trusted: reliability diagrams and risk-coverage curves."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.reporting.gallery import Gallery
from pipeline.reporting.markup import Html, join, note, table
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.predictions import Predictions, risk_coverage
from pipeline.reporting.results import CLEAN, ModelResult, Results, best_of
from pipeline.reporting.style import Theme, canvas, method_line, only_horizontal


def section(results: Results, predictions: Predictions, gallery: Gallery, numbers: Numbers) -> Html:
    """Reliability of ours and the best baseline, risk against coverage, and the ECE and AURC of everyone."""
    shown = compared(results)
    pieces: list[object] = [_reliability(shown, gallery), _risk(results, predictions, gallery)]
    pieces.append(_summary(results, numbers))
    return join(pieces)


def compared(results: Results) -> list[ModelResult]:
    """The best form of ours and the best other method under corruption: what the pictures set side by side."""
    ours = best_of([m for m in results.contenders if m.ours], "task_known", None)
    other = best_of([m for m in results.contenders if not m.ours], "task_known", None)
    return [model for model in (ours, other) if model is not None]


def _ends(results: Results) -> list[str]:
    levels = list(results.levels)
    return list(dict.fromkeys([levels[0], levels[-1]])) if levels else []


def _reliability(shown: list[ModelResult], gallery: Gallery) -> Html:
    shown = [model for model in shown if model.reliability]
    if not shown:
        return note("No reliability bins were measured, so there is no reliability diagram.")
    levels = list(shown[0].reliability)
    ends = list(dict.fromkeys([levels[0], levels[-1]]))

    def draw(theme: Theme) -> Figure:
        figure = canvas(3.9)
        panels = figure.subplots(1, len(ends), sharey=True, squeeze=False)[0]
        for panel, level in zip(panels, ends, strict=True):
            panel.plot([0, 100], [0, 100], color=theme.muted, linewidth=1, linestyle=":")
            for index, model in enumerate(shown):
                _reliability_line(panel, theme, model, level, index)
            panel.set_title(f"Accuracy (%) by confidence (%), {level}")
            panel.set_xlabel("mean confidence of the bin (%)")
            panel.set_xlim(-1, 102)
            panel.set_ylim(-3, 103)
            panel.legend(loc="upper left")
        panels[0].set_ylabel("accuracy of the bin (%)")
        return figure

    return gallery.add(
        "reliability",
        draw,
        alt="Reliability diagram: accuracy against confidence, clean and at the hardest corruption",
        caption="On the dotted diagonal confidence is right; below it the model is overconfident. Larger dots hold "
        "more images. Task known, all tasks together.",
    )


def _reliability_line(axes: Axes, theme: Theme, model: ModelResult, level: str, index: int) -> None:
    bins: dict[str, Any] = model.reliability.get(level) or {}
    confidence, accuracy, count = (np.asarray(bins.get(k, []), np.float64) for k in ("confidence", "accuracy", "count"))
    held = count > 0 if len(count) else np.zeros(0, bool)
    if not held.any():
        return
    line = method_line(model.name, index)
    gap = float((count[held] * np.abs(confidence[held] - accuracy[held])).sum() / count[held].sum())
    # Line and dots are one legend entry; only the dots carry how many images a bin holds.
    axes.plot(100 * confidence[held], 100 * accuracy[held], color=line.colour(theme), linewidth=1.6,
              label=f"{model.title}, ECE {100 * gap:.1f} %")  # fmt: skip
    axes.scatter(
        100 * confidence[held], 100 * accuracy[held], s=14 + 190 * count[held] / count[held].sum(),
        color=line.colour(theme), marker="o", edgecolor=theme.paper, linewidth=0.8, zorder=3,
    )  # fmt: skip


def _risk(results: Results, predictions: Predictions, gallery: Gallery) -> Html:
    shown = [model for model in results.contenders if model.name in predictions]
    if len(shown) > 5:  # more than five curves cannot be told apart: ours, and the best others
        others = sorted((m for m in shown if not m.ours), key=lambda m: -(m.corrupted("task_known") or 0))[:3]
        shown = [model for model in shown if model.ours or model in others]
    ends = _ends(results)
    if not shown or not ends:
        return note("No per-image predictions with labels were found, so there is no risk-coverage curve.")

    def draw(theme: Theme) -> Figure:
        figure = canvas(3.9)
        panels = figure.subplots(1, len(ends), sharey=True, squeeze=False)[0]
        for panel, level in zip(panels, ends, strict=True):
            for index, model in enumerate(shown):
                curve = risk_coverage(predictions[model.name], level)
                if curve is None:
                    continue
                line = method_line(model.name, index)
                panel.plot(
                    100 * curve[0], 100 * curve[1], color=line.colour(theme), linewidth=line.width, label=model.title
                )
            panel.set_title(f"Error (%) among the most confident images, {level}")
            panel.set_xlabel("coverage: share of images answered (%)")
            panel.set_xlim(0, 100)
            only_horizontal(panel)
        panels[0].set_ylim(bottom=0)  # shared, so set once every curve is there
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
        return figure

    return gallery.add(
        "risk_coverage",
        draw,
        alt="Risk-coverage curves: error rate against share of images answered",
        caption="If the model may decline its least confident images, how many of the rest are wrong? Lower is better; "
        "the right end is the plain error rate. All tasks together, task known.",
    )


def _summary(results: Results, numbers: Numbers) -> Html:
    ends = _ends(results)
    header = ["Method", *(f"{metric}, {level}" for metric in ("ECE (%)", "AURC (%)") for level in ends)]
    rows = []
    for model in results.models:
        values = [
            (metric, level, model.mean("task_known", level, metric)) for metric in ("ece", "aurc") for level in ends
        ]
        if all(value is None for _, _, value in values):
            continue
        for metric, level, value in values:
            numbers.add(f"calibration.{model.name}.{level}.{metric}", value, model.reference)
        rows.append([model.title, *("–" if value is None else f"{100 * value:.1f}" for _, _, value in values)])
    if not rows:
        return note("Neither ECE nor AURC was measured.")
    return table(header, rows) if CLEAN in results.levels or ends else note("No level was measured.")
