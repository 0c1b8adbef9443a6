"""Same-class share of the positive and negative pairs: does ADS sort edges better than cosine does?

Labels are read for this diagnosis only; no fitting stage sees them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure

from pipeline.errors import DataError
from pipeline.reporting.gallery import Gallery
from pipeline.reporting.markup import Html, join, note, tag
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.parts import Parts, numbers_of, read_json, read_table
from pipeline.reporting.predictions import image_keys, labels_by_image
from pipeline.reporting.style import Theme, canvas, only_vertical

Rows = np.ndarray[Any, np.dtype[np.int64]]
COSINE_BINS = 1 << 16
UNKNOWN = -1


@dataclass(frozen=True)
class SameClass:
    """Counts of labelled pairs. `same` of `total` in M+ and M−, and in a split by cosine with as many positives."""

    positive: tuple[int, int]
    negative: tuple[int, int]
    cosine_positive: tuple[float, int]
    cosine_negative: tuple[float, int]
    unlabelled: int
    unified: bool

    @property
    def everything(self) -> tuple[int, int]:
        """(same, total) over all pairs: what a split without any knowledge would show."""
        return self.positive[0] + self.negative[0], self.positive[1] + self.negative[1]


def classes_of_rows(parts: Parts) -> tuple[Rows, bool]:
    """Class of every global row (-1 unlabelled), and whether classes of different tasks were unified.

    The unified map is the fitted head's; without one, equal class means equal task and local class.
    """
    units = parts.units("embed")
    tables = [read_table(unit.path / "samples.parquet", ("task", "sample_id")) for unit in units]
    if not tables:
        return np.zeros(0, np.int64), False
    table = pa.concat_tables(tables)
    keys, labels = labels_by_image(parts)
    place = pc.index_in(image_keys(table), value_set=keys)
    position = np.asarray(pc.fill_null(place, UNKNOWN).to_numpy(zero_copy_only=False), dtype=np.int64)
    local = np.full(len(position), UNKNOWN, np.int64)
    local[position >= 0] = labels[position[position >= 0]].astype(np.int64)
    tasks = [str(task) for task in table.column("task").to_pylist()]
    maps = _unified_maps(parts)
    return _global_classes(tasks, local, maps), bool(maps)


def _global_classes(tasks: list[str], local: Rows, maps: dict[str, list[int]]) -> Rows:
    names = {task: index for index, task in enumerate(sorted(set(tasks)))}
    stride = int(local.max(initial=0)) + 1
    found = np.full(len(local), UNKNOWN, np.int64)
    for index, (task, label) in enumerate(zip(tasks, local.tolist(), strict=True)):
        if label == UNKNOWN:
            continue
        known = maps.get(task)
        # Task-local classes are numbered past the unified ones, so the two can stand beside each other.
        found[index] = known[label] if known and label < len(known) else 1_000_000 + names[task] * stride + label
    return found


def _unified_maps(parts: Parts) -> dict[str, list[int]]:
    unit = parts.holding("fit_head", "config.json")
    maps = read_json(unit.file("config.json")).get("maps") if unit is not None else None
    return {str(task): [int(value) for value in values] for task, values in (maps or {}).items()}


def read_same_class(parts: Parts) -> SameClass | None:
    """Same-class counts over all pairs, streamed unit by unit; None without pairs or without any labelled pair."""
    units = parts.units("pairs")
    classes, unified = classes_of_rows(parts)
    if not units or not (classes >= 0).any():
        return None
    counts = np.zeros((2, 2), np.int64)  # [negative, positive] x [other class, same class]
    cosines = np.zeros((2, COSINE_BINS), np.int64)  # a histogram, so that memory does not grow with the edges
    unlabelled = 0
    for unit in units:
        table = read_table(unit.path / "pairs.parquet", ("anchor", "other", "kind", "cosine"))
        anchor, other = (numbers_of(table, name).astype(np.int64) for name in ("anchor", "other"))
        if len(anchor) and max(anchor.max(), other.max()) >= len(classes):
            raise DataError(f"{unit.path}: a pair names a row past the {len(classes):,} embedded; run pairs again")
        known = (classes[anchor] >= 0) & (classes[other] >= 0)
        same = (classes[anchor] == classes[other])[known].astype(np.int64)
        kind = np.asarray(
            pc.equal(pc.cast(table.column("kind"), pa.string()), "positive").to_numpy(zero_copy_only=False)
        )
        positive = kind.astype(bool)[known].astype(np.int64)
        np.add.at(counts, (positive, same), 1)
        place = ((np.clip(numbers_of(table, "cosine")[known], -1, 1) + 1) / 2 * (COSINE_BINS - 1)).astype(np.int64)
        for value in (0, 1):
            cosines[value] += np.bincount(place[same == value], minlength=COSINE_BINS)
        unlabelled += int((~known).sum())
    if counts.sum() == 0:
        return None
    n_positive = int(counts[1].sum())
    cosine_same = _same_among_highest(cosines, n_positive)
    return SameClass(
        positive=(int(counts[1, 1]), n_positive),
        negative=(int(counts[0, 1]), int(counts[0].sum())),
        cosine_positive=(cosine_same, n_positive),
        cosine_negative=(float(counts[:, 1].sum()) - cosine_same, int(counts[0].sum())),
        unlabelled=unlabelled,
        unified=unified,
    )


def _same_among_highest(cosines: Rows, count: int) -> float:
    """Same-class pairs among the `count` of highest cosine; a bin that is cut counts by its share."""
    totals, same = cosines.sum(axis=0)[::-1], cosines[1][::-1]
    before = np.cumsum(totals) - totals
    share = np.clip((count - before) / np.maximum(totals, 1), 0, 1)
    return float((share * same).sum())


def section(parts: Parts, gallery: Gallery, numbers: Numbers) -> Html:
    """The comparison as a picture, its numbers recorded."""
    found = read_same_class(parts)
    if found is None:
        return note("No pairs with labels on both sides in this run, so their same-class share cannot be shown.")
    sources = [parts.group(stage) for stage in ("pairs", "embed", "shard") if parts.units(stage)]
    bars = {
        "M⁺ by ADS": ("positive", _share(found.positive)),
        "M⁻ by ADS": ("negative", _share(found.negative)),
        "all pairs": ("all", _share(found.everything)),
        "M⁺ by cosine": ("cosine_positive", _share(found.cosine_positive)),
        "M⁻ by cosine": ("cosine_negative", _share(found.cosine_negative)),
    }
    for name, share in bars.values():
        numbers.add(f"same_class.{name}", share, *sources)
    for name, count in {"positive": found.positive[1], "negative": found.negative[1]}.items():
        numbers.add(f"same_class.n_{name}", count, *sources)
    gap = _share(found.positive) - _share(found.negative)
    cosine_gap = _share(found.cosine_positive) - _share(found.cosine_negative)
    picture = gallery.add(
        "pairs_same_class",
        lambda theme: _draw(theme, {label: share for label, (_, share) in bars.items()}),
        alt="Same-class share in positive and negative pairs, by ADS and by cosine",
        caption=_finding(found, gap, cosine_gap),
    )
    return join([picture, tag("p", _remark(found), class_="small")])


def _share(counts: tuple[float, int]) -> float:
    return counts[0] / counts[1] if counts[1] else float("nan")


def _finding(found: SameClass, gap: float, cosine_gap: float) -> str:
    said = f"{found.positive[1]:,} positive and {found.negative[1]:,} negative pairs. ADS parts the classes by "
    said += f"{100 * gap:.1f} points (M⁺ minus M⁻), a cosine split of equal size by {100 * cosine_gap:.1f}. "
    if not np.isfinite(gap):
        return f"{found.positive[1]:,} positive and {found.negative[1]:,} negative pairs: one side is empty, no gap."
    if gap < 0:
        return said + "A negative gap means the split is inverted: negatives share the class more often than positives."
    better = (
        "better than" if gap > cosine_gap + 0.005 else "worse than" if gap < cosine_gap - 0.005 else "no better than"
    )
    return said + f"So here ADS sorts pairs {better} cosine alone."


def _remark(found: SameClass) -> str:
    how = "unified label space: equal class names of different tasks are one class"
    if not found.unified:
        how = "task and local class, as no unified label map was found"
    left = f" {found.unlabelled:,} pairs without a label on both sides are left out." if found.unlabelled else ""
    return f"Labels serve this diagnosis only; nothing was fitted on them. Same class by {how}.{left}"


def _draw(theme: Theme, shares: dict[str, float]) -> Figure:
    figure = canvas(2.5)
    axes = figure.subplots()
    colours = [theme.blue, theme.orange, theme.grey, theme.sky, theme.yellow]
    places = [0.0, 1.0, 2.3, 3.6, 4.6]
    values = [100 * share for share in shares.values()]
    bars = axes.barh(places, np.nan_to_num(values), height=0.78, color=colours)
    labels = [f"{value:.1f}" if np.isfinite(value) else "none" for value in values]
    axes.bar_label(bars, labels, padding=4, fontsize=9, color=theme.ink)
    axes.axvline(values[2], color=theme.muted, linewidth=1, linestyle=":")
    axes.set_yticks(places, list(shares))
    axes.tick_params(axis="y", labelcolor=theme.ink, labelsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(100.0 if max(values) > 85 else 1.15 * float(np.nanmax(values)), 1.0))
    axes.set_title("Same-class share of the pairs (%); dotted: share over all of them")
    only_vertical(axes)
    return figure
