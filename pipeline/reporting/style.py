"""Colours, themes and the rendering of one figure; every picture of the report looks alike because of this file."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

WIDTH_IN = 9.2
DPI = 150


@dataclass(frozen=True)
class Theme:
    """Colours of the page that figures repeat, so that a picture has no visible border in either mode."""

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    blue: str
    sky: str
    orange: str
    green: str
    pink: str
    red: str
    yellow: str
    grey: str
    ramp: tuple[str, ...]  # low to high, for heat maps
    levels: tuple[str, ...]  # clean, then rising corruption

    def level(self, index: int) -> str:
        """Colour of the index-th corruption level."""
        return self.levels[min(index, len(self.levels) - 1)]

    def heat(self) -> Colormap:
        """Sequential map whose low end is the paper itself: nothing there reads as nothing."""
        return LinearSegmentedColormap.from_list(f"heat-{self.name}", list(self.ramp))


# Hues after Okabe and Ito (told apart under the common colour vision deficiencies); the dark set is lighter.
LIGHT = Theme(
    "light", "#ffffff", "#1c2126", "#5c6773", "#e4e8ec", "#0067ab", "#48a4dd", "#dd9100", "#008f6b", "#c06596",
    "#cf5a00", "#b8a800", "#8b949e", ("#f4f7fa", "#b7d4ea", "#5a9fd0", "#1a6aa8", "#073763"),
    ("#0067ab", "#e2b04a", "#e07f1f", "#b23a12"),
)  # fmt: skip
DARK = Theme(
    "dark", "#161b22", "#e6eaee", "#9aa5b1", "#2b323b", "#58aef0", "#9ad3f7", "#f0b23c", "#3fc79c", "#e295c0",
    "#f08a4b", "#e5d94c", "#8b949e", ("#1d242d", "#1f4a70", "#2f7db8", "#74b9ea", "#e3f2fd"),
    ("#58aef0", "#f2d07a", "#f0a04b", "#e8674a"),
)  # fmt: skip
THEMES = (LIGHT, DARK)


@dataclass(frozen=True)
class Line:
    """How one method is drawn wherever it appears."""

    hue: str
    marker: str
    dash: str = "-"
    width: float = 1.5

    def colour(self, theme: Theme) -> str:
        """The hue in the given theme."""
        value: str = getattr(theme, self.hue)
        return value


# Ours stand out by weight, the references recede by dash; marker and hue both differ, so no pair rests on hue alone.
METHOD_LINES = {
    "pretrained": Line("grey", "", ":", 1.8),
    "experts": Line("ink", "", "--", 1.5),
    "weight_average": Line("grey", "v"),
    "task_arithmetic": Line("pink", "s"),
    "ties": Line("yellow", "D"),
    "dare": Line("yellow", "v", "-."),
    "pcb": Line("pink", "h", "-."),
    "model_stock": Line("grey", "p", "-."),
    "tsv_m": Line("red", "X"),
    "iso_c": Line("red", "*", "-."),
    "wudi": Line("green", "<"),
    "wudi_exact": Line("green", ">", "-."),
    "ace": Line("orange", "d"),
    "doge": Line("muted", "H"),
    "regmean": Line("pink", "8"),
    "lot": Line("red", "s", "--"),
    "bmm": Line("yellow", "X", "--"),
    "map": Line("muted", "D", "--"),
    "adamerging": Line("orange", "^"),
    "surgery": Line("orange", "P", "--"),
    "twin_merging": Line("green", "P"),
    "wemoe": Line("pink", "*"),
    "bd_task": Line("sky", "o", "-", 2.2),
    "bd_layer": Line("blue", "o", "-", 2.8),
    "bd_task_static": Line("sky", "o", "--"),
    "bd_layer_static": Line("blue", "o", "--"),
}
OTHER_LINE = Line("grid", "", "-", 1.0)
SPARE_LINES = (Line("red", "X"), Line("muted", "<"), Line("green", ">", "-."), Line("pink", "h", "-."))


def method_line(name: str, position: int = 0) -> Line:
    """The line of a method; one this file does not know gets a spare by its position."""
    return METHOD_LINES.get(name) or SPARE_LINES[position % len(SPARE_LINES)]


@contextmanager
def _applied(theme: Theme) -> Iterator[None]:
    settings: Any = {
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "font.family": "DejaVu Sans",  # ships with matplotlib: the same picture on every machine
        "font.size": 9,
        "text.parse_math": False,  # a task or class name with a dollar sign is a name
    }
    with matplotlib.rc_context(settings):
        yield


def render(draw: Callable[[Theme], Figure], themes: Sequence[Theme] = THEMES) -> dict[str, bytes]:
    """PNG bytes of the figure that `draw` makes, by theme name.

    No date or version inside: equal figures are equal bytes. All themes hold the same texts and shapes, so the layout,
    which is half of the work, is solved once.
    """
    pictures: dict[str, bytes] = {}
    places: list[Bbox] | None = None
    for theme in themes:
        with _applied(theme):
            figure = draw(theme)
            if places is not None:
                figure.set_layout_engine("none")
                for axes, place in zip(figure.axes, places, strict=True):
                    axes.set_position(place)
            surface: Any = FigureCanvasAgg(figure)  # its methods carry no types
            surface.draw()
        places = [axes.get_position() for axes in figure.axes]
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(surface.buffer_rgba())[..., :3]).save(buffer, format="png")
        pictures[theme.name] = buffer.getvalue()
    return pictures


def canvas(height_in: float, width_in: float = WIDTH_IN) -> Figure:
    """An empty figure with constrained layout, outside pyplot's global state."""
    figure = Figure(figsize=(width_in, height_in), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.09, h_pad=0.07)
    return figure


def only_horizontal(axes: Axes) -> None:
    """Keep the grid lines a reader measures heights against."""
    axes.grid(visible=False, axis="x")
    axes.spines["left"].set_visible(False)


def only_vertical(axes: Axes) -> None:
    """Keep the grid lines a reader measures lengths against."""
    axes.grid(visible=False, axis="y")
    axes.spines["bottom"].set_visible(False)
