"""Where the time went: forward and backward passes against everything else, by stage and by kind, and bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from pipeline.reporting.gallery import Gallery
from pipeline.reporting.markup import Html, details, join, note, table, tag
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.style import Theme, canvas, only_vertical

TOTAL = "total"  # the record's own sum over the run, known only once the report is written
COMPUTE_SPANS = frozenset({"forward", "backward", "forward_backward", "optimiser", "train", "compute"})

COMMIT = "commit (hash, flush, rename)"
INSIDE = "inside units, not itemised"
BETWEEN = "between units (schedule, start workers, wait)"


@dataclass(frozen=True)
class StageTime:
    """One stage of the run. `wall_s` as a clock sees it, `busy_s` summed over units; spans lie inside busy."""

    stage: str
    units: int
    reused: int
    wall_s: float
    busy_s: float
    spans: Mapping[str, float]
    size_bytes: int
    commit_s: float
    parallel: float
    slowest_spans: Mapping[str, float]

    @property
    def compute_s(self) -> float:
        """Wall seconds of forward and backward passes: their busy seconds, shared by the workers that ran at once.

        Never less than the passes of the slowest unit: it runs on while the other workers have nothing left to do.
        """
        return min(self.wall_s, max(_passes(self.spans) / self.parallel, _passes(self.slowest_spans)))

    @property
    def other_s(self) -> float:
        """Wall seconds of everything else: decoding, storage, hashing, starting workers, waiting."""
        return self.wall_s - self.compute_s


def _passes(spans: Mapping[str, float]) -> float:
    return sum(seconds for name, seconds in spans.items() if name in COMPUTE_SPANS)


def read_timing(rows: Sequence[Mapping[str, Any]]) -> list[StageTime]:
    """The run's timing rows; a missing field counts as zero."""
    found = []
    for row in rows:
        wall, busy = float(row.get("wall_s") or 0), float(row.get("busy_s") or 0)
        if row.get("stage") == TOTAL:
            continue
        # Without the number of lanes, busy over wall is the average number of units that ran at once.
        parallel = float(row.get("lanes") or 0) or (busy / wall if wall > 0 else 1.0)
        found.append(
            StageTime(
                stage=str(row.get("stage", "?")),
                units=int(row.get("units") or 0),
                reused=int(row.get("reused") or 0),
                wall_s=wall,
                busy_s=busy,
                spans={str(k): float(v) for k, v in (row.get("spans") or {}).items()},
                size_bytes=int(row.get("bytes") or 0),
                commit_s=float(row.get("commit_s") or 0),
                parallel=max(1.0, parallel),
                slowest_spans={str(k): float(v) for k, v in (row.get("slowest_spans") or {}).items()},
            )
        )
    return found


def overhead_items(times: Sequence[StageTime], overhead: Mapping[str, float]) -> list[tuple[str, float]]:
    """(kind, wall seconds) of all time outside forward and backward passes, largest first; sums to that time."""
    items: dict[str, float] = {}
    for time in times:
        spent = 0.0
        for name, seconds in time.spans.items():
            if name not in COMPUTE_SPANS:
                share = min(seconds / time.parallel, max(0.0, time.other_s - spent))
                items[name] = items.get(name, 0.0) + share
                spent += share
        commit = min(time.commit_s / time.parallel, max(0.0, time.other_s - spent))
        items[COMMIT] = items.get(COMMIT, 0.0) + commit
        inside = max(0.0, time.busy_s / time.parallel - time.compute_s - spent)
        inside = min(inside, max(0.0, time.other_s - spent - commit))
        items[INSIDE] = items.get(INSIDE, 0.0) + inside
        # A row without units, such as the start of the executor, is an item of its own.
        outside = BETWEEN if time.units else time.stage
        items[outside] = items.get(outside, 0.0) + max(0.0, time.other_s - spent - commit - inside)
    for name, seconds in overhead.items():
        items[name] = items.get(name, 0.0) + float(seconds)
    return sorted(((n, s) for n, s in items.items() if s > 0.0005), key=lambda item: (-item[1], item[0]))


def section(run: Mapping[str, Any], gallery: Gallery, numbers: Numbers) -> Html:
    """Stages as bars, the itemised overhead, and a table of everything."""
    times = read_timing(run.get("timing") or ())
    if not times:
        return note("The run record holds no timing.")
    source = f"runs/{run.get('run_id', 'unknown')}"
    overhead = {str(k): float(v) for k, v in (run.get("overhead") or {}).items()}
    compute = sum(time.compute_s for time in times)
    total = sum(time.wall_s for time in times) + sum(overhead.values())
    share = (total - compute) / total if total > 0 else 0.0
    size = sum(time.size_bytes for time in times)
    for name, value in {"total_s": total, "compute_s": compute, "overhead_share": share, "bytes": size}.items():
        numbers.add(f"timing.{name}", value, source)
    for time in times:
        numbers.add(f"timing.{time.stage}.wall_s", time.wall_s, source)
        numbers.add(f"timing.{time.stage}.bytes", time.size_bytes, source)
    sentence = (
        f"{duration(total)} of wall time, {duration(compute)} of it in forward and backward passes; everything else is "
        f"{100 * share:.0f} %. The stages left {readable_bytes(size)} in the store."
    )
    if reused := sum(time.reused for time in times):
        sentence += f" {reused} of {sum(time.units for time in times)} units were taken from an earlier run."
    pieces: list[object] = [tag("p", sentence)]
    if total > 0:
        pieces.append(
            gallery.add(
                "timing",
                lambda theme: _draw(theme, times),
                alt="Wall time of every stage, forward and backward passes against everything else",
                caption="Blue: forward and backward passes. Orange: all the rest, itemised below.",
            )
        )
    pieces.append(_overhead_table(overhead_items(times, overhead), total))
    pieces.append(details("Every stage in numbers", _stage_table(times)))
    return join(pieces)


def _draw(theme: Theme, times: list[StageTime]) -> Figure:
    figure = canvas(0.8 + 0.27 * len(times))
    axes = figure.subplots()
    names = [time.stage for time in times]
    compute, other = [time.compute_s for time in times], [time.other_s for time in times]
    axes.barh(names, compute, color=theme.blue, height=0.72, label="forward and backward passes")
    ends = axes.barh(names, other, left=compute, color=theme.orange, alpha=0.75, height=0.72, label="everything else")
    labels = ["reused" if t.units and t.reused == t.units else f"{t.wall_s:.1f} s" for t in times]
    axes.bar_label(ends, labels, padding=4, fontsize=8, color=theme.muted)
    axes.tick_params(axis="y", labelcolor=theme.ink)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_title("Wall time by stage (s)")
    axes.legend(loc="lower right")
    only_vertical(axes)
    return figure


def _overhead_table(items: list[tuple[str, float]], total: float) -> Html:
    if not items:
        return note("No time outside forward and backward passes was recorded.")
    rows: list[list[object]] = [[name, f"{seconds:.1f}", f"{100 * seconds / total:.1f}"] for name, seconds in items]
    together = sum(seconds for _, seconds in items)
    cells = [tag("td", tag("strong", v)) for v in (f"{together:.1f}", f"{100 * together / total:.1f}")]
    rows.append([tag("th", tag("strong", "together"), scope="row"), *cells])
    return table(["Outside forward and backward passes", "seconds", "% of the run"], rows, class_="narrow")


def _stage_table(times: list[StageTime]) -> Html:
    rows = [
        [
            time.stage,
            f"{time.units:,}",
            f"{time.reused:,}",
            f"{time.wall_s:.2f}",
            f"{time.compute_s:.2f}",
            f"{time.busy_s:.2f}",
            ", ".join(f"{name} {seconds:.2f}" for name, seconds in sorted(time.spans.items(), key=lambda i: -i[1]))
            or "–",
            readable_bytes(time.size_bytes),
        ]
        for time in times
    ]
    header = ["Stage", "units", "reused", "wall s", "passes s", "busy s", "spans (busy seconds)", "size"]
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
