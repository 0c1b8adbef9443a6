"""Where the time went: forward and backward passes against everything else, by stage and by kind, and bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from pipeline.reporting.gallery import Gallery
from pipeline.reporting.markup import Html, details, join, note, table, tag
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.style import Theme, canvas, only_vertical
from pipeline.timing import TOTAL, UNIT, Interval, Spent, StageTime, read_timing, seconds_of, spent


def section(run: Mapping[str, Any], gallery: Gallery, numbers: Numbers) -> Html:
    """Stages along the run's clock, the itemised overhead, and a table of everything."""
    times = [time for time in read_timing(run.get("timing") or ()) if time.stage != TOTAL]
    if not times:
        return note("The run record holds no timing.")
    source = f"runs/{run.get('run_id', 'unknown')}"
    where = spent(times)
    size = sum(time.size_bytes for time in times)
    found = {"total_s": where.total_s, "compute_s": where.passes_s, "overhead_share": where.overhead_share}
    for name, value in {**found, "bytes": size}.items():
        numbers.add(f"timing.{name}", value, source)
    for time in times:
        numbers.add(f"timing.{time.stage}.wall_s", time.wall_s, source)
        numbers.add(f"timing.{time.stage}.bytes", time.size_bytes, source)
    sentence = (
        f"{duration(where.total_s)} until this report was begun. During {duration(where.passes_s)} of it a forward or "
        f"backward pass was running; the other {100 * where.overhead_share:.0f} % are itemised below. The stages "
        f"left {readable_bytes(size)} in the store."
    )
    if reused := sum(time.reused for time in times):
        sentence += f" {reused} of {sum(time.units for time in times)} units were taken from an earlier run."
    figure = gallery.add(
        "timing",
        lambda theme: _draw(theme, times),
        alt="When each stage ran, forward and backward passes against everything else",
        caption="Blue: at least one unit in a forward or backward pass. Orange: units at anything else. Pale: waiting "
        "for a worker or starting one.",
    )
    return join([tag("p", sentence), figure, _overhead_table(where), details("Every stage in numbers", _table(times))])


def _draw(theme: Theme, times: list[StageTime]) -> Figure:
    figure = canvas(0.9 + 0.27 * len(times))
    axes = figure.subplots()
    for row, time in enumerate(times):
        _bars(axes, row, [time.interval], theme.grid, None)
        _bars(axes, row, time.at.get(UNIT, [] if time.units else [time.interval]), theme.orange, "everything else")
        _bars(axes, row, time.passes, theme.blue, "forward and backward passes")
        axes.annotate(
            f"{time.wall_s:.1f} s", (time.interval[1], row), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8, color=theme.muted,
        )  # fmt: skip
    axes.set_yticks(range(len(times)), [time.stage for time in times])
    axes.tick_params(axis="y", labelcolor=theme.ink)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.set_title("When each stage ran (seconds of the run)")
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(named.values(), named.keys(), loc="upper right")
    only_vertical(axes)
    return figure


def _bars(axes: Any, row: int, intervals: Sequence[Interval], colour: str, label: str | None) -> None:
    if intervals:
        lengths = [(began, ended - began) for began, ended in intervals]
        axes.broken_barh(lengths, (row - 0.36, 0.72), color=colour, linewidth=0, label=label)


def _overhead_table(where: Spent) -> Html:
    if not where.others:
        return note("No time outside forward and backward passes was recorded.")
    rows: list[list[object]] = [
        [name, f"{seconds:.1f}", f"{100 * seconds / where.total_s:.1f}"] for name, seconds in where.others
    ]
    together = where.total_s - where.passes_s
    cells = [tag("td", tag("strong", v)) for v in (f"{together:.1f}", f"{100 * where.overhead_share:.1f}")]
    rows.append([tag("th", tag("strong", "together"), scope="row"), *cells])
    return table(["While no forward or backward pass ran", "seconds", "% of the run"], rows, class_="narrow")


def _table(times: list[StageTime]) -> Html:
    rows = [
        [
            time.stage,
            f"{time.units:,}",
            f"{time.reused:,}",
            f"{time.began_s:.2f}",
            f"{time.wall_s:.2f}",
            f"{seconds_of(time.passes):.2f}",
            f"{time.busy_s:.2f}",
            ", ".join(f"{name} {seconds:.2f}" for name, seconds in sorted(time.spans.items(), key=lambda i: -i[1]))
            or "–",
            readable_bytes(time.size_bytes),
        ]
        for time in times
    ]
    header = ["Stage", "units", "reused", "began s", "wall s", "passes s", "busy s", "spans (busy seconds)", "size"]
    return table(header, rows, class_="stages")


def duration(seconds: float) -> str:
    """`41.2 s`, `7 min 05 s`, `3 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def readable_bytes(count: int) -> str:
    """`12.4 MB`: decimal units, one digit past the point."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
