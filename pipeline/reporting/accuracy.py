"""The accuracy tables (as in the paper) and the picture of accuracy against corruption level."""

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.reporting.gallery import Gallery
from pipeline.reporting.headline import percent, signed
from pipeline.reporting.markup import Html, details, join, note, table, tag
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.results import CLEAN, PROTOCOLS, ModelResult, Results, best_of
from pipeline.reporting.style import OTHER_LINE, Theme, canvas, method_line, only_horizontal

FOOTNOTES = {
    "pretrained": "reference: no expert used",
    "experts": "reference: K separate models, each on its own task",
}
LABELS = {"task labels": "reads the task of each training image", "labelled validation": "reads validation labels"}
OTHERS = "the other methods"
DRAWN, ALONE = 7, 12  # of more methods than ALONE the best DRAWN have a colour and a name, the others are grey


def main_tables(results: Results, numbers: Numbers) -> Html:
    """One table a protocol: methods down, clean and corruption levels across, relative drop in brackets."""
    return join(_protocol_table(results, protocol, numbers) for protocol in PROTOCOLS)


def _protocol_table(results: Results, protocol: str, numbers: Numbers) -> Html:
    shown = [model for model in results.models if model.protocols.get(protocol)]
    n_tasks = len(results.tasks) - len(results.unseen)
    title = tag("h3", f"Mean accuracy over {n_tasks} tasks, {PROTOCOLS[protocol]} (%)")
    if not shown:
        return join([title, note(f"No model was evaluated with the protocol “{PROTOCOLS[protocol]}”.")])
    columns: list[str | None] = [*results.levels, None]
    winners = {level: best_of(results.contenders, protocol, level) for level in columns}
    rows = []
    for model in shown:
        cells: list[object] = [_method_cell(model, protocol)]
        for level in columns:
            accuracy = model.corrupted(protocol) if level is None else model.mean(protocol, level)
            numbers.add(f"table.{protocol}.{model.name}.{level or 'corrupted'}.accuracy", accuracy, model.reference)
            drop = None if level in (CLEAN, None) else model.drop(protocol, str(level))
            if drop is not None:
                numbers.add(f"table.{protocol}.{model.name}.{level}.relative_drop", -drop, model.reference)
            cells.append(_accuracy_cell(accuracy, drop, best=winners[level] is model, summary=level is None))
        rows.append(cells)
    header = ["Method", *results.levels, f"mean {results.corruptions}"]
    explain = "Bold: best merging method of the column. In brackets: relative change from clean, in %."
    if left_out := [model.title for model in results.models if model not in shown]:
        explain += f" Not one model, so not in this table: {', '.join(left_out)}."
    return join([title, table(header, rows, class_="results"), tag("p", explain, class_="small")])


def _method_cell(model: ModelResult, protocol: str | None = None) -> Html:
    """The method's name; with a protocol, also what it costs and what was lost by compression under that protocol."""
    remark = FOOTNOTES.get(model.name) or LABELS.get(str((model.method or {}).get("need")))
    cost = model.cost.get("extra_parameters")
    # Thin enough for a laptop: what a method costs stands below its name, not in a column of its own.
    under = [remark] if remark else []
    if isinstance(cost, int) and cost > 0:
        under.append(f"+{cost / 1e6:.2f} M parameters" if cost >= 10_000 else f"+{cost:,} parameters")
    if isinstance(size := model.cost.get("bytes_per_expert"), int):
        under.append(f"{size / 2**20:.2f} MiB an expert on disk")
    if (error := model.cost.get("relative_error_max")) is not None:
        mean = model.cost["relative_error_mean"]
        under.append(
            f"task vectors compressed, relative error {percent(mean)} % on average, {percent(error)} % at most"
        )
    if (lost := model.against_dense.get(protocol or "", {}).get(CLEAN)) is not None:
        under.append(f"{signed(lost)} points on clean images against whole task vectors")
    kind = "reference" if model.is_reference else "ours" if model.ours else "baseline"
    extra = tag("span", "; ".join(under), class_="under") if under and protocol else ""
    return tag("th", model.title, extra, scope="row", class_=kind)


def _accuracy_cell(accuracy: float | None, drop: float | None, best: bool, summary: bool) -> Html:
    value = tag("strong" if best else "span", percent(accuracy))
    bracket = tag("span", f" ({signed(drop)})", class_="drop") if drop is not None else ""
    # The bar starts at zero and is the full cell at 100 %: lengths compare honestly.
    bar = f"--share:{accuracy:.3f}" if summary and accuracy is not None else None
    return tag("td", value, bracket, class_="bar" if summary else None, style=bar)


def per_task_tables(results: Results, numbers: Numbers) -> Html:
    """Accuracy of every task: clean and corrupted mean at sight, each level and the task-free protocol on a click."""
    if not results.tasks:
        return note("No task was evaluated in this run.")
    pieces: list[object] = [_task_table(results, "task_known", None, numbers)]
    for protocol, title in PROTOCOLS.items():
        for level in results.levels:
            body = _task_table(results, protocol, level, numbers)
            pieces.append(details(f"Every task at {level}, {title}", body))
    return join(pieces)


def _task_table(results: Results, protocol: str, level: str | None, numbers: Numbers) -> Html:
    """One level, or clean beside the corrupted mean when `level` is None."""
    shown = [model for model in results.models if model.protocols.get(protocol)]
    levels = (CLEAN, "corrupted") if level is None else (level,)
    if not shown:
        return note(f"No model was evaluated with the protocol “{PROTOCOLS[protocol]}”.")

    def value(model: ModelResult, task: str, at: str) -> float | None:
        return model.corrupted(protocol, task=task) if at == "corrupted" else model.task(protocol, at, task)

    best = {
        (task, at): max(
            (v for m in shown if not m.is_reference and (v := value(m, task, at)) is not None), default=None
        )
        for task in results.tasks
        for at in levels
    }
    rows = []
    for model in shown:
        cells: list[object] = [_method_cell(model)]
        for task in results.tasks:
            for at in levels:
                accuracy = value(model, task, at)
                if level is not None:
                    numbers.add(f"tasks.{protocol}.{model.name}.{at}.{task}.accuracy", accuracy, model.reference)
                top = not model.is_reference and accuracy is not None and accuracy == best[task, at]
                cells.append(tag("td", tag("strong" if top else "span", percent(accuracy))))
        rows.append(cells)
    if level is not None:
        return table(["Method", *results.tasks], rows, class_="results")
    spans = [tag("th", task, colspan=len(levels), scope="colgroup") for task in results.tasks]
    header = [at if at == CLEAN else results.corruptions for _ in results.tasks for at in levels]
    return table(header, rows, class_="results", above=[tag("th", "Method", rowspan=2, scope="col"), *spans])


def accuracy_figure(results: Results, gallery: Gallery) -> Html:
    """The `<figure>` of mean accuracy at each level, one panel a protocol."""
    protocols = [p for p in PROTOCOLS if any(model.protocols.get(p) for model in results.models)]
    if not protocols:
        return note("No accuracy was measured in this run, so there is nothing to draw.")

    def draw(theme: Theme) -> Figure:
        figure = canvas(4.3)
        panels = figure.subplots(1, len(protocols), sharey=True, squeeze=False)[0]
        for panel, protocol in zip(panels, protocols, strict=True):
            panel.set_title(f"Mean accuracy (%), {PROTOCOLS[protocol]}")
            _draw_lines(panel, results, protocol, theme)
        handles: dict[str, Artist] = {}
        for panel in panels:
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if OTHERS in handles:  # last, and once
            handles[OTHERS] = handles.pop(OTHERS)
        figure.legend(list(handles.values()), list(handles), loc="outside right center")
        return figure

    return gallery.add(
        "accuracy_by_level",
        draw,
        alt="Mean accuracy of every method at each corruption level",
        caption="Accuracy against corruption. Dotted and dashed are bounds, not methods: the pretrained model and the "
        "individual experts. Levels are graded severities; the axis does not start at zero.",
    )


def _in_colour(results: Results) -> set[str]:
    """The models that keep a line of their own: all, or where they are many the bounds, ours and the best others."""
    if len(results.models) <= ALONE:
        return {model.name for model in results.models}
    others = [model for model in results.contenders if not model.ours]
    best = sorted(others, key=lambda model: -(model.corrupted("task_known") or 0.0))[:DRAWN]
    return {model.name for model in results.models if model not in others or model in best}


def _draw_lines(axes: Axes, results: Results, protocol: str, theme: Theme) -> None:
    places = range(len(results.levels))
    named = _in_colour(results)
    for index, model in enumerate(results.models):
        values = [model.mean(protocol, level) for level in results.levels]
        if all(value is None for value in values):
            continue
        own = model.name in named
        line = method_line(model.name, index) if own else OTHER_LINE
        axes.plot(
            places,
            [float("nan") if value is None else 100 * value for value in values],
            color=line.colour(theme),
            marker=line.marker,
            markersize=5.5,
            linestyle=line.dash,
            linewidth=line.width,
            label=model.title if own else OTHERS,
            zorder=3 if model.ours else 2 if own else 1,
        )
    axes.set_xticks(list(places), results.levels)
    axes.margins(x=0.06)
    only_horizontal(axes)
