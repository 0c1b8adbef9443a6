"""What the measured points say of larger pools: a model of few terms, fitted, and the pictures.

t_exact = a n^2 D              every pair once
t_ivf   = c n L D + s n^2 P D / L + e E + u U
          nearest of L lists, P lists scanned, E edges sorted and written, U joins begun
The terms are those of the planner; a, c, s, e, u are fitted, none below zero. Shape letters: R points, T terms.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Point = Mapping[str, Any]
Array = NDArray[np.float64]
TRUSTED = 10.0  # times the largest pool that was measured


def exact_terms(n_rows: float, width: float) -> list[float]:
    """Of t_exact, in 10^12 operations."""
    return [n_rows**2 * width / 1e12]


def ivf_terms(n_rows: float, width: float, n_lists: float, n_probes: float, edges: float, joins: float) -> list[float]:
    """Of t_ivf: 10^12 operations of either kind, 10^6 edges, 10^3 joins."""
    scanned = n_rows**2 * n_probes / n_lists
    return [n_rows * n_lists * width / 1e12, scanned * width / 1e12, edges / 1e6, joins / 1e3]


def fitted(terms_RT: Sequence[Sequence[float]], seconds_R: Sequence[float]) -> Array:
    """The factors [T], none below zero, with the least sum of squared relative errors."""
    terms = np.asarray(terms_RT, float) / np.asarray(seconds_R, float)[:, None]
    factors = np.zeros(terms.shape[1])
    held = np.ones(terms.shape[1], bool)
    while held.any():
        found = np.linalg.lstsq(terms[:, held], np.ones(len(terms)), rcond=None)[0]
        if (found >= 0).all():
            factors[held] = found
            break
        held[np.flatnonzero(held)[found.argmin()]] = False
    return factors


def report(points: Sequence[Point], width: int) -> list[str]:
    """Markdown lines: the factors, how well they explain the points, and what 10^7 to 10^9 rows would take."""
    exact, ivf = [p for p in points if p.get("exact_s")], [p for p in points if p.get("ivf_s")]
    lines = ["", "## Model", ""]
    if not exact or not ivf:
        return [*lines, "No points to fit."]
    a = fitted([exact_terms(p["rows"], width) for p in exact], [p["exact_s"] for p in exact])
    b = fitted([_terms_of(p, width) for p in ivf], [p["ivf_s"] for p in ivf])
    lines += [
        f"t_exact = {a[0]:.3g} s per 10^12 n^2 D; t_ivf = {b[0]:.3g} s per 10^12 n L D + {b[1]:.3g} s per 10^12 "
        f"n^2 P D / L + {b[2]:.3g} s per 10^6 edges + {b[3]:.3g} s per 10^3 joins, on this machine.",
        "",
        "| rows | exact measured | model | IVF measured | model |",
        "|---|---|---|---|---|",
    ]
    for p in points:
        exact_s = float(np.dot(exact_terms(p["rows"], width), a))
        ivf_s = float(np.dot(_terms_of(p, width), b)) if p.get("ivf_s") else float("nan")
        lines.append(f"| {p['rows']:,} | {_s(p.get('exact_s'))} | {_s(exact_s)} | {_s(p.get('ivf_s'))} | {_s(ivf_s)} |")
    largest = max(p["rows"] for p in ivf)
    lines += ["", "| rows | lists, probes | exact | IVF | features | trusted |", "|---|---|---|---|---|---|"]
    degree, probes = ivf[-1]["edges"] / ivf[-1]["rows"], ivf[-1]["n_probes"]
    for n_rows in (10**7, 10**8, 10**9):
        lists = min(2**16, 2 ** int(np.ceil(np.log2(3 * np.sqrt(n_rows)))))
        joins = (n_rows / 2**21) ** 2 / 2  # partitions of two million rows: what a node of 64 GiB joins
        ivf_s = float(np.dot(ivf_terms(n_rows, width, lists, probes, degree * n_rows, joins), b))
        exact_s = float(np.dot(exact_terms(n_rows, width), a))
        trusted = "yes" if n_rows <= TRUSTED * largest else "no"
        gib = n_rows * width * 4 / 2**30
        lines.append(
            f"| {n_rows:,} | {lists}, {probes:.0f} | {_s(exact_s)} | {_s(ivf_s)} | {gib:,.0f} GiB | {trusted} |"
        )
    spread = len(ivf) - np.count_nonzero(b)
    lines += [
        "",
        f"Seconds are of this one machine. {len(ivf)} points fit {np.count_nonzero(b)} factors"
        + (" (no freedom left: the agreement above proves nothing)" if spread < 1 else "")
        + f". Trusted to {TRUSTED:g} times the largest pool measured, {largest:,} rows: beyond, features no longer lie "
        "in the file cache, and the probes that the recall needs were only assumed to stay what they are.",
    ]
    return lines


def _terms_of(point: Point, width: int) -> list[float]:
    return ivf_terms(point["rows"], width, point["n_lists"], point["n_probes"], point["edges"], point["joins"])


def _s(seconds: float | None) -> str:
    if seconds is None or not np.isfinite(seconds):
        return "–"
    for size, name in ((31557600.0, "years"), (86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.3g} s"


def draw(points: Sequence[Point], path: Path) -> None:
    """Time and memory against rows and time against edges, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    time, memory, edges = figure.subplots(1, 3)
    rows = [p["rows"] for p in points]
    for name, title, marker in (("exact_s", "exact", "o"), ("ivf_s", "IVF", "s"), ("add_s", "adding 5 %", "^")):
        shown = [(p["rows"], p[name], p["edges"]) for p in points if p.get(name)]
        time.plot([s[0] for s in shown], [s[1] for s in shown], marker=marker, label=title)
        edges.plot([s[2] for s in shown], [s[1] for s in shown], marker=marker, label=title)
    memory.plot(rows, [p["peak_bytes"] / 2**30 for p in points], marker="o")
    for axes, title, unit in ((time, "Seconds", "rows"), (memory, "Peak GiB", "rows"), (edges, "Seconds", "edges")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(unit)
        axes.set_title(f"{title} by {unit}", fontsize=10)
        axes.grid(visible=True, alpha=0.3)
    time.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
