"""Seen against unseen tasks, as in the paper's second table: what merging does to tasks whose expert is not in it."""

from pipeline.reporting.headline import percent, signed
from pipeline.reporting.markup import Html, join, tag
from pipeline.reporting.markup import table as html_table
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.results import CLEAN, PROTOCOLS, ModelResult, Results

BAR = "pretrained"


def table(results: Results, numbers: Numbers) -> Html:
    """Mean accuracy over seen and over unseen tasks, clean and corrupted; nothing where every task is seen."""
    if not results.unseen:
        return Html("")
    seen = [task for task in results.tasks if task not in results.unseen]
    pieces: list[object] = [
        tag("h3", "Seen and unseen tasks (%)"),
        tag(
            "p",
            f"Merged: experts of {', '.join(seen)}. Only evaluated: {', '.join(results.unseen)}; no image of "
            "theirs was fitted on. Everywhere else here a mean is over the seen tasks. In brackets: points against the "
            "pretrained model, the bar on unseen tasks.",
            class_="small",
        ),
    ]
    for protocol, title in PROTOCOLS.items():
        shown = [model for model in results.models if model.protocols.get(protocol)]
        if shown:
            rows = [_row(model, results, protocol, numbers) for model in shown]
            columns = [f"{which}, {at}" for which in ("seen", "unseen") for at in (CLEAN, results.corruptions)]
            pieces.append(html_table([f"Method, {title}", *columns], rows, class_="results"))
    return join(pieces)


def _row(model: ModelResult, results: Results, protocol: str, numbers: Numbers) -> list[object]:
    kind = "reference" if model.is_reference else "ours" if model.ours else "baseline"
    cells: list[object] = [tag("th", model.title, scope="row", class_=kind)]
    bar = results.get(BAR)
    for unseen in (False, True):
        for level in (CLEAN, None):
            value = model.over(protocol, level, unseen=unseen)
            which = "unseen" if unseen else "seen"
            numbers.add(f"{which}.{protocol}.{model.name}.{level or 'corrupted'}.accuracy", value, model.reference)
            least = bar.over(protocol, level, unseen=True) if bar is not None and unseen else None
            against = ""
            if value is not None and least is not None and model.name != BAR:
                against = tag("span", f" ({signed(value - least)})", class_="drop")
            cells.append(tag("td", percent(value), against))
    return cells
