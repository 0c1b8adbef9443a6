"""The neighbourhoods: how many neighbours samples have, and how many have none."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from pipeline.reporting.gallery import Gallery
from pipeline.reporting.markup import Html, join, note, tag
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.parts import Parts, numbers_of, read_table
from pipeline.reporting.style import Theme, canvas, only_horizontal

Degrees = np.ndarray[Any, np.dtype[np.int64]]
HUB_SHARE = 0.01


def read_degrees(parts: Parts) -> tuple[Degrees, str] | None:
    """Degree of every sample, in global row order, and the reference it came from; None without neighbourhoods."""
    if units := parts.units("neighbours"):
        offsets = [np.load(unit.path / "offsets.npy") for unit in units]
        return np.concatenate([np.diff(o) for o in offsets]).astype(np.int64), parts.group("neighbours")
    if units := parts.units("score"):
        tables = [read_table(unit.path / "scores.parquet", ("degree",)) for unit in units]
        return np.concatenate([numbers_of(t, "degree") for t in tables]).astype(np.int64), parts.group("score")
    return None


def section(parts: Parts, gallery: Gallery, numbers: Numbers) -> Html:
    """The degree distribution with its isolated share, the hubs, and how surely the edges are all there."""
    found = read_degrees(parts)
    if found is None or len(found[0]) == 0:
        return note("This run has no neighbourhoods, so no degrees can be shown.")
    degrees, source = found
    isolated = float((degrees == 0).mean())
    linked = degrees[degrees > 0]
    median = float(np.median(degrees))
    for name, value in {
        "samples": len(degrees),
        "edges": int(degrees.sum()),
        "isolated_share": isolated,
        "mean": float(degrees.mean()),
        "median": median,
        "max": int(degrees.max()),
    }.items():
        numbers.add(f"degree.{name}", value, source)
    caption = (
        f"{len(degrees):,} samples, {int(degrees.sum()):,} edges. {100 * isolated:.1f} % of the samples are isolated: "
        f"they have no neighbour within the radius, hence no ADS, and are counted rather than given zero. Degree: mean "
        f"{degrees.mean():.1f}, median {median:.0f}, 95th percentile {np.percentile(degrees, 95):.0f}, largest "
        f"{degrees.max():,}."
    )
    if len(linked) == 0:
        return join([note("Every sample is isolated: the radius is too small for any edge."), note(caption)])
    pictures = [
        gallery.add(
            "degree_distribution",
            lambda theme: _draw(theme, degrees),
            alt="Share of samples by number of neighbours",
            caption=caption,
        ),
        gallery.add(
            "hubs",
            lambda theme: _draw_hubs(theme, degrees),
            alt="Number of neighbours of each sample, by rank",
            caption=_hubs(degrees, source, numbers),
        ),
    ]
    return join([*pictures, tag("p", _search(parts, numbers), class_="small")])


def _hubs(degrees: Degrees, source: str, numbers: Numbers) -> str:
    """How much of the graph hangs on few samples."""
    ranked = np.sort(degrees)[::-1]
    n_top = max(1, round(HUB_SHARE * len(ranked)))
    share = float(ranked[:n_top].sum() / ranked.sum())
    numbers.add("degree.hub_edge_share", share, source)
    return (
        f"Hubs: the {n_top:,} samples with the most neighbours ({100 * HUB_SHARE:g} % of all) hold {100 * share:.1f} % "
        f"of the edges; the largest is near {100 * ranked[0] / len(ranked):.1f} % of the pool. With equal degrees the "
        "line would be level."
    )


def _search(parts: Parts, numbers: Numbers) -> str:
    """How the edges were found, and what that is known to have missed."""
    joins, said = parts.units("edges"), []
    metrics = [unit.report["metrics"] for unit in joins]
    wanted, found = (sum(m.get(name, 0.0) for m in metrics) for name in ("recall_edges", "recall_found"))
    if wanted:
        numbers.add("edges.recall", found / wanted, parts.group("edges"))
        said.append(
            f"Edge recall {found / wanted:.4f}: of {wanted:,.0f} exact edges of a fixed sample of each of "
            f"{len(joins):,} joins, {found:,.0f} were found."
        )
        if raised := sum(bool(unit.report["notes"].get("probes_raised")) for unit in joins):
            said.append(f"In {raised:,} joins more lists had to be searched than the calibration sample needed.")
    else:
        said.append("Every pair was compared, so no edge is missing.")
    if cut := sum(unit.report["metrics"].get("truncated", 0.0) for unit in parts.units("neighbours")):
        numbers.add("edges.truncated", cut, parts.group("neighbours"))
        said.append(f"The degree cap left {cut:,.0f} edges out.")
    return " ".join(said)


def degree_bins(largest: int) -> list[tuple[int, int]]:
    """Inclusive (low, high) bins: 0, 1, 2–3, 4–7, …, the last one holding `largest`."""
    bins, low = [(0, 0)], 1
    while low <= largest:
        bins.append((low, 2 * low - 1))
        low *= 2
    return bins


def _draw(theme: Theme, degrees: Degrees) -> Figure:
    bins = degree_bins(int(degrees.max()))
    shares = [100 * float(((degrees >= low) & (degrees <= high)).mean()) for low, high in bins]
    figure = canvas(3.2)
    axes = figure.subplots()
    colours = [theme.orange] + [theme.blue] * (len(bins) - 1)
    bars = axes.bar(range(len(bins)), shares, width=0.82, color=colours)
    axes.bar_label(bars, [f"{s:.1f}" if s >= 0.05 else "" for s in shares], padding=2, fontsize=8, color=theme.muted)
    labels = ["0\n(isolated)"] + [str(low) if low == high else f"{low}–{high}" for low, high in bins[1:]]
    axes.set_xticks(range(len(bins)), labels)
    axes.set_xlabel("neighbours within the radius")
    axes.set_title("Share of samples (%) by number of neighbours")
    axes.margins(y=0.1)
    only_horizontal(axes)
    return figure


def _draw_hubs(theme: Theme, degrees: Degrees) -> Figure:
    ranked = np.sort(degrees[degrees > 0])[::-1]
    shown = np.unique(np.geomspace(1, len(ranked), 400).astype(int))
    figure = canvas(3.0)
    axes = figure.subplots()
    axes.plot(shown, ranked[shown - 1], color=theme.blue, linewidth=1.8)
    axes.axhline(float(ranked.mean()), color=theme.muted, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("samples, the one with the most neighbours first")
    axes.set_title("Neighbours of each sample, by rank; dotted: their mean")
    only_horizontal(axes)
    return figure
