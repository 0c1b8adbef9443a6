"""How a merge grows with the number of experts: seconds should be linear, memory constant."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

__all__ = ["scaling"]

COUNTS = (2, 4, 8, 16, 32)
METHODS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Task Arithmetic", "task_arithmetic", {}),
    ("Ties, global", "ties", {}),
    ("Ties, per tensor", "ties", {"trim": "per_tensor"}),
    ("WUDI exact", "wudi_exact", {}),
    ("ACE", "ace", {}),
)
ROUNDS = 3
LONG_S = 2.0  # a merge this long needs no repetition


class Merges(Protocol):
    """What merges on request."""

    def states(self, layers: int, experts: int) -> int: ...

    def merge(
        self, method: str, parameters: Mapping[str, Any], limit_s: float, experts: int | None = None
    ) -> dict[str, Any]: ...


def scaling(side: Merges, limit_s: float, picture: Path | None) -> list[str]:
    """A table of seconds and models beyond the inputs over K, one block a tower; the picture where a path is given."""
    lines = [
        "",
        "## K from 2 to 32, one block of each tower",
        "",
        "Seconds (models beyond the inputs); the growth is the exponent of K between 4 and 32, 1 being linear.",
        "",
        "| method | " + " | ".join(f"K = {count}" for count in COUNTS) + " | growth |",
        "|---" * (len(COUNTS) + 2) + "|",
    ]
    print("\n".join(lines), flush=True)
    model_bytes = side.states(1, max(COUNTS))
    seconds: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    for title, method, parameters in METHODS:
        cells = []
        for count in COUNTS:
            answers = [side.merge(method, parameters, limit_s, experts=count)]
            if answers[0].get("seconds", LONG_S) < LONG_S:
                answers += [side.merge(method, parameters, limit_s, experts=count) for _ in range(ROUNDS - 1)]
            if any("failed" in answer for answer in answers):
                cells.append("failed")
                continue
            seconds.setdefault(title, []).append(statistics.median(answer["seconds"] for answer in answers))
            memory.setdefault(title, []).append(max(answer["peak_bytes"] or 0 for answer in answers) / model_bytes)
            cells.append(f"{seconds[title][-1]:.2f} ({memory[title][-1]:.2f})")
        found = seconds.get(title, [])
        growth = math.log(found[-1] / found[1]) / math.log(COUNTS[-1] / COUNTS[1]) if len(found) == len(COUNTS) else 0
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {growth:.2f} |")
        print(lines[-1], flush=True)
    if picture is not None:
        _draw(seconds, memory, picture)
        lines += ["", f"![seconds and memory over K]({picture.name})"]
    return lines


def _draw(seconds: Mapping[str, list[float]], memory: Mapping[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "bd-merging"  # same data, same bytes
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for title, values in seconds.items():
        if len(values) == len(COUNTS):
            left.plot(COUNTS, values, marker="o", label=title)
            right.plot(COUNTS, memory[title], marker="o", label=title)
    left.set(xscale="log", yscale="log", xlabel="experts K", ylabel="seconds", title="time: slope 1 is linear")
    right.set_ylim(bottom=0)
    right.set(xscale="log", xlabel="experts K", ylabel="models beyond the inputs", title="peak memory")
    right.axhline(1.5, color="grey", linestyle="--", linewidth=1)
    for axis in (left, right):
        axis.set_xticks(COUNTS, [str(count) for count in COUNTS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
