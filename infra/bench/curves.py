"""Curves of a benchmark as one picture of log-log panels."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Curve:
    """One line: measured, or a computed floor, which is dashed."""

    title: str
    x: list[float]
    y: list[float]
    floor: bool = False


def picture(path: Path, panels: dict[str, list[Curve]]) -> None:
    """Write a PNG of one panel each; a panel's title is "unit by what"."""
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * lines), layout="constrained")
    for place, (title, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, place)
        unit, _, what = title.partition(" by ")
        for curve in curves:
            style = "--" if curve.floor else "o-"
            axes.plot(curve.x, curve.y, style, label=curve.title, linewidth=1.4, markersize=4)
        axes.set(xscale="log", yscale="log", xlabel=what, ylabel=unit)
        axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
