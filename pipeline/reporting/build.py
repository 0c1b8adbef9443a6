"""The report of a run: files in, page and pictures out. Pure but for reading; the report stage does the writing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.costs import read_costs
from pipeline.reporting import (
    accuracy,
    calibration,
    fronts,
    graph,
    losses,
    pairs,
    ranking,
    router,
    timing,
    trust,
    unseen,
    used,
)
from pipeline.reporting.gallery import Gallery
from pipeline.reporting.headline import Verdict, asides, certainty, headline, percent, signed, verdict
from pipeline.reporting.markup import Html, details, join, note, table, tag
from pipeline.reporting.numbers import Numbers, report_json
from pipeline.reporting.page import Section, Tile, page
from pipeline.reporting.parts import Parts, reference
from pipeline.reporting.predictions import Predictions, read_predictions
from pipeline.reporting.results import CLEAN, PROTOCOLS, Results, read_results
from pipeline.store import Artefact


@dataclass(frozen=True)
class Report:
    """The three products, in memory: `figures` are PNG bytes by name without suffix."""

    html: str
    json: str
    figures: dict[str, bytes]
    metrics: dict[str, float]


def build_report(artefacts: Mapping[str, Sequence[Artefact]], run: Mapping[str, Any], *, dark: bool = True) -> Report:
    """The report of the given committed units.

    `run` is a run record or the known part of one (`run_id`, `name`, `created`, `config`, `git`, `versions`, `timing`,
    `overhead`); every key may be missing. So may any stage: its section then says so. Without
    `dark`, figures are drawn for light pages only. `DataError` on a damaged file.
    """
    parts, numbers, gallery = Parts(artefacts), Numbers(), Gallery(dark=dark)
    results = read_results(parts)
    predictions = read_predictions(parts, results.unseen)
    outcomes = {protocol: verdict(results, predictions, protocol) for protocol in PROTOCOLS}
    _record_outcomes(outcomes, numbers)
    sections = _sections(parts, run, results, predictions, gallery, numbers)
    name = str(run.get("name") or "BD-Merging")
    known = outcomes["task_known"] or outcomes["task_free"]
    html = page(
        name=name,
        eyebrow=_eyebrow(name, run),
        headline=headline(known, results.corruptions) if known else "Nothing was evaluated in this run.",
        leads=_leads(outcomes, results),
        tiles=_tiles(known, results, numbers),
        sections=sections,
    )
    text = report_json(numbers, parts, str(run.get("run_id") or ""), name, list(gallery.pictures))
    metrics = {"figures": float(len(gallery.pictures)), "html_bytes": float(len(html.encode()))}
    return Report(html, text, dict(gallery.pictures), metrics)


def _sections(
    parts: Parts,
    run: Mapping[str, Any],
    results: Results,
    predictions: Mapping[str, Predictions],
    gallery: Gallery,
    numbers: Numbers,
) -> list[Section]:
    has_results = bool(results.models)
    nothing = note("No model was evaluated in this run.")
    table_body = nothing
    if has_results:
        table_body = join([accuracy.main_tables(results, numbers), unseen.table(results, numbers)])
    return [
        Section("results", "Results", "Methods against corruption, as in the paper’s table.", table_body),
        Section(
            "ranking",
            "Accuracy and cost",
            "Every method by its place, with what it needs and what it took.",
            join(
                [
                    ranking.section(results, read_costs(parts.by_stage), gallery, numbers),
                    fronts.section(parts, gallery, numbers),
                ]
            ),
        ),
        Section(
            "shift",
            "Accuracy under shift",
            "How fast each method loses accuracy as images get worse.",
            accuracy.accuracy_figure(results, gallery) if has_results else nothing,
        ),
        Section(
            "tasks",
            "Per task",
            "Accuracy in %, task known; every level and the task-free protocol below.",
            accuracy.per_task_tables(results, numbers) if has_results else nothing,
        ),
        Section(
            "router",
            "Routing",
            "How much of each expert the router gives to the images of each task.",
            router.section(results, gallery, numbers),
        ),
        Section(
            "graph",
            "Neighbourhoods",
            "Who is near whom in the pretrained feature space.",
            graph.section(parts, gallery, numbers),
        ),
        Section(
            "pairs",
            "Positive and negative pairs",
            "Whether the adjacency discrepancy score (ADS) separates same-class from other-class neighbours.",
            pairs.section(parts, gallery, numbers),
        ),
        Section(
            "trust",
            "Uncertainty and ADS under corruption",
            "Whether the scores notice that an image is corrupted, without being told.",
            trust.section(parts, gallery, numbers),
        ),
        Section(
            "calibration",
            "Calibration",
            "Whether confidence means what it says.",
            calibration.section(results, predictions["task_known"], gallery, numbers),
        ),
        Section("losses", "Loss curves", "Everything that was fitted.", losses.section(parts, gallery, numbers)),
        Section("timing", "Time and size", "", timing.section(run, gallery, numbers)),
        Section(
            "used",
            "What was used",
            "Settings that were given or found, and inputs refused.",
            used.section(parts, run, numbers),
        ),
        Section("sources", "Sources", "The stored units this report was made from.", _sources(parts)),
    ]


def _eyebrow(name: str, run: Mapping[str, Any]) -> str:
    known: list[object] = [name, run.get("run_id"), run.get("created")]
    git = run.get("git")
    if isinstance(git, Mapping):
        git = git.get("sha") or git.get("commit")
    if git:
        known.append(f"git {str(git)[:10]}")
    return " · ".join(str(item) for item in known if item)


def _leads(outcomes: Mapping[str, Verdict | None], results: Results) -> list[str]:
    known, free = outcomes["task_known"], outcomes["task_free"]
    said = []
    if known is not None:
        said.append(" ".join([certainty(known), *asides(results, "task_known")]))
    if known is not None and free is not None:
        said.append(f"When nobody tells the task: {headline(free, results.corruptions)}")
    return said


def _tiles(known: Verdict | None, results: Results, numbers: Numbers) -> list[Tile]:
    if known is None:
        return []
    model = known.ours or known.winner
    tiles = [
        Tile(
            f"{percent(model.corrupted(known.protocol))} %",
            f"{model.title}, mean of {results.corruptions}, {PROTOCOLS[known.protocol]}",
        ),
    ]
    if known.margin is not None and known.rival is not None:
        tiles.append(Tile(f"{signed(known.margin)} pts", f"against {known.rival.title}, the best other method"))
    clean = model.mean(known.protocol, CLEAN)
    if clean is not None:
        tiles.append(Tile(f"{percent(clean)} %", f"{model.title} on clean images"))
    hardest = results.levels[-1] if results.levels else CLEAN
    drop = model.drop(known.protocol, hardest)
    if drop is not None and hardest != CLEAN:
        tiles.append(Tile(f"{signed(drop)} %", f"relative change from clean to {hardest}"))
    found = [(v["value"], n.split(".")) for n, v in numbers.values.items() if n.startswith("auroc.") and v["value"]]
    if found:
        value, (_, score, level) = max(found)
        tiles.append(Tile(f"{value:.2f}", f"AUROC of {trust.SCORES.get(score, score)} for {level} images"))
    total = numbers.values.get("timing.total_s")
    if total and total["value"]:
        tiles.append(Tile(timing.duration(float(total["value"])), "wall time of the run’s stages"))
    return tiles


def _record_outcomes(outcomes: Mapping[str, Verdict | None], numbers: Numbers) -> None:
    for protocol, outcome in outcomes.items():
        if outcome is None:
            continue
        sources = [m.reference for m in (outcome.ours or outcome.winner, outcome.rival) if m is not None]
        numbers.add(f"headline.{protocol}.winner", outcome.winner.name, outcome.winner.reference)
        numbers.add(f"headline.{protocol}.margin", outcome.margin, *sources)
        numbers.add(f"headline.{protocol}.margin_standard_error", outcome.margin_se, *sources)


def _sources(parts: Parts) -> Html:
    rows = [[reference(unit), tag("td", tag("code", unit.key))] for unit in parts.everything()]
    if not rows:
        return note("No stored unit was read.")
    return join([details(f"{len(rows)} units with their keys", table(["Unit", "key"], rows, class_="used"))])
