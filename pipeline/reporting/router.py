"""Router weights by task, expert and layer group, clean beside the hardest corruption: what routing does."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.reporting.gallery import Gallery
from pipeline.reporting.markup import Html, join, note, tag
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.results import CLEAN, ModelResult, Results
from pipeline.reporting.style import Theme, canvas

TASKS_A_ROW = 4
Weights = np.ndarray[Any, np.dtype[np.float64]]  # [G layer groups, K experts], each row a mean over samples


def section(results: Results, gallery: Gallery, numbers: Numbers) -> Html:
    """Heat maps of every model with a router, ours first."""
    routed = sorted((m for m in results.models if m.router and _weights(m)), key=lambda m: (not m.ours, m.name))
    if not routed:
        return note("No evaluated model has a router, so there are no routing weights to show.")
    return join(_model(model, gallery, numbers) for model in routed)


def _model(model: ModelResult, gallery: Gallery, numbers: Numbers) -> Html:
    weights = _weights(model)
    first = CLEAN if CLEAN in weights else next(iter(weights))
    shown = list(dict.fromkeys([first, list(weights)[-1]]))
    router = model.router
    assert router is not None
    experts = [str(name) for name in router.get("experts", ())]
    groups = [str(name) for name in router.get("groups", ())]
    own: dict[str, list[float]] = {level: [] for level in shown}
    for level in shown:
        for task, matrix in weights[level].items():
            for k, expert in enumerate(experts[: matrix.shape[1]]):
                mean = float(matrix[:, k].mean())
                numbers.add(f"router.{model.name}.{level}.{task}.{expert}.mean_weight", mean, model.reference)
                if expert == task:
                    own[level].append(mean)
    finding = "; ".join(f"{level} {np.mean(values):.2f}" for level, values in own.items() if values)
    shares = all(matrix.sum(axis=1).max() <= 1 + 1e-3 for level in shown for matrix in weights[level].values())
    even = (
        f"uniform would be {1 / max(1, len(experts)):.2f}" if shares else "gates of their own, which add up to any sum"
    )
    caption = f"Mean weight of the task’s own expert: {finding} ({even}). "
    caption += "Outlined: the task’s own expert; the stronger the blue, the more weight."
    single = all(matrix.shape[0] == 1 for matrix in weights[first].values())
    draw = _draw_matrix if single else _draw_layers
    picture = gallery.add(
        f"router_{model.name}",
        lambda theme: draw(theme, {level: weights[level] for level in shown}, experts, groups),
        alt=f"Router weights of {model.title} by task and expert",
        caption=caption,
    )
    return join([tag("h3", model.title), picture])


def _weights(model: ModelResult) -> dict[str, dict[str, Weights]]:
    """{level: {task: [G, K]}} of the model's router."""
    levels: Mapping[str, Any] = (model.router or {}).get("mean_weights") or {}
    return {
        str(level): {str(task): np.atleast_2d(np.asarray(w, dtype=np.float64)) for task, w in tasks.items()}
        for level, tasks in levels.items()
        if tasks
    }


def _draw_layers(theme: Theme, weights: dict[str, dict[str, Weights]], experts: list[str], groups: list[str]) -> Figure:
    """One panel a task and level: layer groups across, experts down."""
    levels, tasks = list(weights), list(next(iter(weights.values())))
    columns = min(TASKS_A_ROW, len(tasks))
    bands = -(-len(tasks) // columns)
    figure = canvas(0.9 + bands * len(levels) * (0.55 + 0.27 * len(experts)))
    panels = figure.subplots(bands * len(levels), columns, squeeze=False)
    image = None
    for panel in panels.flat:
        panel.set_visible(False)
    for index, task in enumerate(tasks):
        band, column = divmod(index, columns)
        for offset, level in enumerate(levels):
            axes = panels[band * len(levels) + offset][column]
            image = _heat(axes, theme, weights[level][task].T, experts if column == 0 else None)
            axes.set_title(f"{task}, {level}", fontsize=9, pad=5)
            if offset == len(levels) - 1:
                _label_groups(axes, groups, weights[level][task].shape[0])
            else:
                axes.set_xticks([])
            _outline_row(axes, theme, experts, task, weights[level][task].shape[0])
    if image is not None:
        bar = figure.colorbar(image, ax=panels.ravel().tolist(), shrink=0.7, aspect=30, pad=0.01)
        bar.set_label("mean router weight", fontsize=8.5)
        bar.outline.set_visible(False)
    return figure


def _draw_matrix(theme: Theme, weights: dict[str, dict[str, Weights]], experts: list[str], groups: list[str]) -> Figure:
    """One panel a level: tasks down, experts across, the weight written in each cell."""
    levels, tasks = list(weights), list(next(iter(weights.values())))
    figure = canvas(1.1 + 0.38 * len(tasks))
    panels = figure.subplots(1, len(levels), squeeze=False)[0]
    for position, (axes, level) in enumerate(zip(panels, levels, strict=True)):
        matrix = np.stack([weights[level][task].mean(axis=0) for task in tasks])
        _heat(axes, theme, matrix, tasks if position == 0 else None)
        axes.set_title(f"Mean router weight, {level}")
        named = [_short(name, 12) for name in experts[: matrix.shape[1]]]
        axes.set_xticks(range(matrix.shape[1]), named)
        if len(named) > 5:
            axes.tick_params(axis="x", rotation=35)
        axes.set_xlabel("expert")
        if position == 0:
            axes.set_ylabel("images of task")
        _write_values(axes, theme, matrix)
        for row, task in enumerate(tasks):
            if task in experts:
                _outline(axes, theme, experts.index(task) - 0.5, row - 0.5, 1)
    return figure


def _heat(axes: Axes, theme: Theme, matrix: Weights, names: list[str] | None) -> Any:
    image = axes.imshow(matrix, cmap=theme.heat(), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(matrix.shape[0]), [_short(n, 14) for n in names[: matrix.shape[0]]] if names else [])
    if names is None:
        axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_visible(True)
    return image


def _write_values(axes: Axes, theme: Theme, matrix: Weights) -> None:
    if matrix.size > 120:
        return
    for (row, column), value in np.ndenumerate(matrix):
        # The ramps run paper to deep (light) and paper to bright (dark): past the middle the paper colour reads.
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=8.5,
            color=theme.paper if value > 0.5 else theme.ink,
        )  # fmt: skip


def _label_groups(axes: Axes, groups: list[str], count: int) -> None:
    names = (groups or [str(index) for index in range(count)])[:count]
    step = -(-count // 14)
    axes.set_xticks(range(0, count, step), [_tail(name, 12) for name in names[::step]], rotation=60, ha="right")
    axes.tick_params(axis="x", labelsize=7.5)


def _outline_row(axes: Axes, theme: Theme, experts: list[str], task: str, width: int) -> None:
    if task in experts:
        _outline(axes, theme, -0.5, experts.index(task) - 0.5, width)


def _outline(axes: Axes, theme: Theme, x: float, y: float, width: int) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, 1, fill=False, edgecolor=theme.orange, linewidth=1.6, clip_on=False))


def _tail(name: str, limit: int) -> str:
    """A layer group's name by its end: `…resblocks.3`, because all of them begin alike."""
    return name if len(name) <= limit else "…" + name[1 - limit :]


def _short(name: str, limit: int) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
