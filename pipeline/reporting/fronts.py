"""The trade-offs a method chose from: MAP's Pareto front, every point a merge, and the one that was taken."""

from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from pipeline.reporting.gallery import Gallery
from pipeline.reporting.markup import Html, details, join, table, tag
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.parts import Parts, numbers_of, read_json, read_table, reference
from pipeline.reporting.style import Theme, canvas, only_horizontal
from pipeline.store import Artefact

FRONT = "front.parquet"
COEFFICIENT, PREDICTED = "coefficient.", "predicted."
MOST_LINES, MOST_ROWS = 200, 40


def section(parts: Parts, gallery: Gallery, numbers: Numbers) -> Html:
    """Each front drawn and as a table, with the chosen point; nothing where no method left one."""
    fronts = [unit for unit in parts.units("baselines") if unit.file(FRONT).is_file()]
    return join(_front(unit, gallery, numbers) for unit in fronts)


def _front(unit: Artefact, gallery: Gallery, numbers: Numbers) -> Html:
    recipe, front = read_json(unit.path / "recipe.json"), read_table(unit.file(FRONT))
    chosen: dict[str, Any] = recipe["chosen"]
    tasks = [name.removeprefix(PREDICTED) for name in front.column_names if name.startswith(PREDICTED)]
    for task in tasks:
        for name in ("coefficients", "measured", "r_squared"):
            numbers.add(f"front.{unit.unit}.{name}.{task}", chosen[name][task], reference(unit))
    coefficients = ", ".join(f"{task} {chosen['coefficients'][task]:.2f}" for task in tasks)
    measured = ", ".join(f"{task} {100 * chosen['measured'][task]:.1f} %" for task in tasks)
    fits = ", ".join(f"{task} {chosen['r_squared'][task]:.2f}" for task in tasks)
    said = (
        f"{recipe['title']} fitted a quadratic of each task’s validation accuracy to sampled merges (R² {fits}) and "
        f"searched {front.num_rows} trade-offs that none beats in every task. Chosen, by the mean it was measured to "
        f"have: coefficients {coefficients}; validation accuracy {measured}."
    )
    picture = gallery.add(
        f"front_{unit.unit}",
        lambda theme: _draw(theme, front, tasks, chosen),
        alt=f"Predicted accuracy of every task along the Pareto front of {recipe['title']}",
        caption="One thin line a trade-off, as the quadratics predict it, which know no bound of 100 %; the thick line "
        "is the chosen one as measured on the validation images.",
    )
    shown = front.slice(0, MOST_ROWS)
    columns = [f"{COEFFICIENT}{task}" for task in tasks], [f"{PREDICTED}{task}" for task in tasks]
    cells = [numbers_of(shown, name) for name in (*columns[0], *columns[1])]
    rows = [
        [
            str(row + 1),
            *(f"{c[row]:.2f}" for c in cells[: len(tasks)]),
            *(f"{100 * c[row]:.1f}" for c in cells[len(tasks) :]),
        ]
        for row in range(shown.num_rows)
    ]
    header = ["", *(f"weight of {task}" for task in tasks), *(f"{task} %" for task in tasks)]
    first = f"the first {MOST_ROWS} of " if front.num_rows > MOST_ROWS else ""
    body = details(f"The front as a table ({first}{front.num_rows})", table(header, rows))
    return join([tag("h3", f"Trade-offs of {recipe['title']}"), tag("p", said), picture, body])


def _draw(theme: Theme, front: pa.Table, tasks: list[str], chosen: dict[str, Any]) -> Figure:
    figure = canvas(3.6)
    axes = figure.subplots()
    values = 100 * np.stack([numbers_of(front, f"{PREDICTED}{task}") for task in tasks], axis=1)
    for number, line in enumerate(values[:MOST_LINES]):
        label = "predicted" if number == 0 else None
        axes.plot(range(len(tasks)), line, color=theme.grey, linewidth=0.7, alpha=0.5, label=label)
    measured = [100 * float(chosen["measured"][task]) for task in tasks]
    axes.plot(range(len(tasks)), measured, color=theme.blue, linewidth=2.6, marker="o", label="chosen, measured")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_title("Accuracy (%) of every task along the front, predicted, and of the chosen merge")
    axes.legend(loc="upper right")
    only_horizontal(axes)
    return figure
