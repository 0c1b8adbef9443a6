"""The methods in the order of their accuracy under corruption, each with what it needs and what it costs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pipeline.costs import Cost
from pipeline.reporting.gallery import Gallery
from pipeline.reporting.headline import percent
from pipeline.reporting.markup import Html, join, note, table, tag
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.parts import reference
from pipeline.reporting.results import CLEAN, ModelResult, Results
from pipeline.reporting.style import Theme, canvas
from pipeline.reporting.timing import duration, readable_bytes

# By what they are told beyond checkpoints, rising; the hue of each in the picture.
NEEDS = {
    "nothing": ("checkpoints alone", "grey"),
    "unlabelled activations": ("some unlabelled images", "sky"),
    "unlabelled batches": ("unlabelled images", "blue"),
    "task labels": ("the task of each training image", "orange"),
    "labelled validation": ("labelled validation images", "red"),
}
READ_LABELS = ("task labels", "labelled validation")
PROTOCOL = "task_known"


@dataclass(frozen=True)
class Point:
    """One method of the picture; accuracy as a share."""

    place: int
    model: ModelResult
    seconds: float
    accuracy: float


def section(results: Results, costs: Mapping[str, Cost], gallery: Gallery, numbers: Numbers) -> Html:
    """Table and picture of accuracy beside cost."""
    ranked = rank(results)
    if not ranked:
        return note("No merging method was evaluated in this run.")
    rows = [_row(place, model, costs.get(model.name), numbers) for place, model in placed(ranked)]
    bounds = [model for model in results.models if model.is_reference]
    rows += [_row(None, model, None, numbers) for model in bounds]
    shifted = f"mean {results.corruptions}" if results.corruptions else "corrupted"
    header = [
        "", "Method", "Needs", "clean", shifted, "task free", "seconds", "memory", "extra parameters", "time a sample",
    ]  # fmt: skip
    explain = (
        "Ranked by the mean accuracy (%) under corruption, task known; “task free” is the same mean when nobody tells "
        "the task, and – where a method has to be told. Seconds: of the merge or fit, and of everything that is made "
        "for it from checkpoints and embedded images, summed, on the machine the run was on. Memory: the most "
        "the merge or fit held beyond its inputs. Time a sample: of one image in a batch of 16, by that of the plain "
        "model, measured one after the other in one process. † reads labels, which the others do not."
    )
    body = [table(header, rows, class_="results ranking"), tag("p", explain, class_="small")]
    return join([*body, _picture(ranked, costs, results, gallery)])


def rank(results: Results) -> list[ModelResult]:
    """The merging methods, the most accurate under corruption first (on clean images where nothing is corrupted)."""

    def score(model: ModelResult) -> float:
        value = accuracy(model)
        return -1.0 if value is None else value

    return sorted(results.contenders, key=score, reverse=True)


def placed(ranked: list[ModelResult]) -> list[tuple[int, ModelResult]]:
    """Each with its place; equals share one."""
    return [(1 + sum((accuracy(m) or -1) > (accuracy(own) or -1) for m in ranked), own) for own in ranked]


def accuracy(model: ModelResult, protocol: str = PROTOCOL) -> float | None:
    """What methods are ranked by, as a share."""
    corrupted = model.corrupted(protocol)
    return model.mean(protocol, CLEAN) if corrupted is None else corrupted


def _row(place: int | None, model: ModelResult, cost: Cost | None, numbers: Numbers) -> list[object]:
    extra = model.cost.get("extra_parameters")
    if cost is not None:
        for name, value in (("seconds", cost.seconds), ("memory_bytes", cost.memory_bytes), ("price", cost.price)):
            numbers.add(f"cost.{model.name}.{name}", value, *map(reference, cost.units))
    if place is not None:
        numbers.add(f"rank.{model.name}", place, model.reference)
    need = str((model.method or {}).get("need", ""))
    kind = "reference" if model.is_reference else "ours" if model.ours else "baseline"
    mark = tag("span", " †", title="reads labels") if need in READ_LABELS else ""
    return [
        tag("td", place or ""),
        tag("th", model.title, mark, scope="row", class_=kind),
        tag("td", NEEDS[need][0] if need in NEEDS else "–", class_="words"),
        percent(model.mean(PROTOCOL, CLEAN)),
        tag("td", tag("strong" if place == 1 else "span", percent(accuracy(model)))),
        percent(model.corrupted("task_free")),
        _or_dash(cost.seconds if cost else None, _brief),
        _or_dash(cost.memory_bytes if cost else None, lambda value: readable_bytes(round(value))),
        "–" if not isinstance(extra, int) else f"{extra / 1e6:.2f} M" if extra >= 10_000 else f"{extra:,}",
        _or_dash(cost.price if cost else None, lambda value: f"{value:.2f} ×"),
    ]


def _brief(seconds: float) -> str:
    """`40 ms` where a second is long, otherwise as everywhere."""
    return f"{1000 * seconds:.0f} ms" if seconds < 0.9995 else duration(seconds)


def _or_dash(value: float | None, written: Callable[[float], str]) -> str:
    return "–" if value is None else written(value)


def _picture(ranked: list[ModelResult], costs: Mapping[str, Cost], results: Results, gallery: Gallery) -> Html:
    """Accuracy against seconds; a point's number is its place in the table."""
    points = [
        Point(place, model, seconds, value)
        for place, model in placed(ranked)
        if (cost := costs.get(model.name)) and (seconds := cost.seconds) and (value := accuracy(model)) is not None
    ]
    if not points:
        return note("What the methods cost is not recorded in this run’s units, so there is nothing to draw.")
    bounds = [(model.title, value) for model in results.models if model.is_reference and (value := accuracy(model))]
    return gallery.add(
        "accuracy_against_cost",
        lambda theme: _draw(theme, points, bounds),
        alt="Accuracy under corruption of every method against the seconds it took to merge or fit",
        caption="Numbers are places in the table above. Up and to the left is better; the time axis is logarithmic and "
        "the accuracy axis does not start at zero.",
    )


def _draw(theme: Theme, points: list[Point], bounds: list[tuple[str, float]]) -> Figure:
    figure = canvas(4.4)
    axes = figure.subplots()
    axes.set_xscale("log")
    for need, (told, hue) in NEEDS.items():
        own = [point for point in points if (point.model.method or {}).get("need") == need]
        if own:
            colour = getattr(theme, hue)
            for ours in (False, True):
                chosen = [point for point in own if point.model.ours is ours]
                if not chosen:
                    continue
                axes.scatter(
                    [point.seconds for point in chosen], [100 * point.accuracy for point in chosen],
                    s=70 if ours else 42, color=colour, marker="D" if ours else "o", zorder=3,
                    label=f"BD-Merging, {told}" if ours else told,
                )  # fmt: skip
    for _, value in bounds:
        axes.axhline(100 * value, color=theme.muted, linestyle=":", linewidth=1.2, zorder=1)
    axes.margins(0.06, 0.1)
    beside = axes.secondary_yaxis("right")  # no point can lie on a title that stands outside
    beside.set_yticks([100 * value for _, value in bounds], [title for title, _ in bounds])
    beside.tick_params(length=0, labelsize=8, labelcolor=theme.muted)
    beside.spines["right"].set_visible(False)
    _number(axes, theme, points)
    axes.set_xlabel("seconds to merge or fit")
    axes.set_title("Mean accuracy (%) under corruption, task known, against cost")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=16))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _number(axes: Axes, theme: Theme, points: list[Point]) -> None:
    """Write every point's place beside it, moved up where two would lie on each other."""
    taken: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda each: each.place):
        x, y = axes.transData.transform((point.seconds, 100 * point.accuracy))
        dx, dy = 11.0, 4.0
        while any(abs(x + dx - other_x) < 16 and abs(y + dy - other_y) < 13 for other_x, other_y in taken):
            dy += 4.0
        taken.append((x + dx, y + dy))
        axes.annotate(
            str(point.place), (point.seconds, 100 * point.accuracy), xytext=(dx * 0.5, dy * 0.5),
            textcoords="offset points", fontsize=8.5, color=theme.ink, zorder=4,
        )  # fmt: skip
