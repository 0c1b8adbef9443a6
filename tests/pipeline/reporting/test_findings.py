"""What the report claims: the headline, the error bar and the diagnoses, each against a slow count."""

import itertools
import json
from collections.abc import Mapping

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import TASKS, Synthetic

from pipeline.reporting.build import build_report
from pipeline.reporting.graph import degree_bins, read_degrees
from pipeline.reporting.headline import asides, certainty, headline, verdict
from pipeline.reporting.pairs import classes_of_rows, read_same_class
from pipeline.reporting.parts import Parts
from pipeline.reporting.predictions import Outcomes, paired_difference, read_predictions, risk_coverage
from pipeline.reporting.results import ModelResult, Results, read_results


def test_headline_names_the_winner_and_its_margin(run: Synthetic) -> None:
    parts = Parts(run.artefacts)
    results, predictions = read_results(parts), read_predictions(parts)
    outcome = verdict(results, predictions, "task_known")
    assert outcome is not None and outcome.rival is not None and outcome.margin is not None
    scores = {m.name: np.mean([m.mean("task_known", level) for level in ("L1", "L2", "L3")]) for m in results.models}
    assert outcome.winner.name == "bd_layer" and outcome.rival.name == "twin_merging"
    assert outcome.margin == pytest.approx(scores["bd_layer"] - scores["twin_merging"])
    assert headline(outcome, "L1–L3").startswith("BD-Merging (layer-wise) leads Twin-Merging by ")
    paired = paired_difference(predictions["task_known"], "bd_layer", "twin_merging")
    assert paired is not None and paired.difference == pytest.approx(outcome.margin)


def test_headline_says_it_when_ours_trails_or_ties() -> None:
    outcome = verdict(_results(bd_layer=0.50, ties=0.60, pretrained=0.55), {}, "task_known")
    assert outcome is not None
    assert headline(outcome, "L1").startswith("bd_layer trails ties by 10.0 points")
    assert "without an error bar" in certainty(outcome)
    said = asides(_results(bd_layer=0.50, ties=0.60, pretrained=0.55), "task_known")
    assert any("Below the pretrained model: bd_layer" in sentence for sentence in said)
    tie = verdict(_results(bd_layer=0.6, ties=0.6), {}, "task_known")
    assert tie is not None and " tie at 60.0 %" in headline(tie, "L1")


def test_references_never_win() -> None:
    outcome = verdict(_results(experts=0.99, bd_layer=0.5, ties=0.4), {}, "task_known")
    assert outcome is not None and outcome.winner.name == "bd_layer"


def test_a_margin_within_two_standard_errors_is_called_a_tie() -> None:
    rng = np.random.default_rng(0)
    hits = rng.random(200) < 0.5
    left, right = hits.astype(float), hits.astype(float)
    left[:3], right[:3] = 1.0, [0.0, 0.0, 1.0]
    predictions = {"task_known": {"bd_layer": _outcomes(left), "ties": _outcomes(right)}}
    outcome = verdict(_results(bd_layer=0.51, ties=0.50), predictions, "task_known")
    assert outcome is not None and outcome.certain is False
    assert "within the noise" in certainty(outcome)


def test_standard_error_of_the_paired_difference_is_that_of_a_loop(run: Synthetic) -> None:
    predictions = read_predictions(Parts(run.artefacts))["task_known"]
    per_task: dict[str, list[float]] = {}
    right: dict[tuple[str, str, str], list[float]] = {}
    for model in ("bd_layer", "ties"):
        (unit,) = (a for a in run.artefacts["evaluate"] if a.unit == model)
        for row in pq.read_table(unit.file("predictions.parquet")).to_pylist():
            if row["level"] != "clean":
                key = (model, row["task"], row["sample_id"])
                right.setdefault(key, []).append(float(row["prediction"] == row["label"]))
    for model, task, sample in right:
        if model == "bd_layer":
            difference = np.mean(right[model, task, sample]) - np.mean(right["ties", task, sample])
            per_task.setdefault(task, []).append(float(difference))
    expected = np.sqrt(sum(np.var(v, ddof=1) / len(v) for v in per_task.values())) / len(per_task)
    paired = paired_difference(predictions, "bd_layer", "ties")
    assert paired is not None
    assert paired.standard_error == pytest.approx(float(expected))
    assert paired.n == sum(map(len, per_task.values()))


def test_same_class_shares_are_those_of_a_loop(run: Synthetic) -> None:
    found = read_same_class(Parts(run.artefacts))
    assert found is not None and found.unified
    rows = [row for unit in run.artefacts["pairs"] for row in pq.read_table(unit.file("pairs.parquet")).to_pylist()]
    for kind, counted in (("positive", found.positive), ("negative", found.negative)):
        same = [run.unified[r["anchor"]] == run.unified[r["other"]] for r in rows if r["kind"] == kind]
        assert counted == (sum(same), len(same))
    ranked = sorted(rows, key=lambda r: -r["cosine"])[: found.positive[1]]
    same_by_cosine = sum(run.unified[r["anchor"]] == run.unified[r["other"]] for r in ranked)
    # The report ranks within bins of 3e-5 in cosine: pairs that close may change places.
    assert found.cosine_positive[0] == pytest.approx(same_by_cosine, abs=5)
    assert found.everything == (found.positive[0] + found.negative[0], len(rows))


def test_classes_are_unified_across_tasks_by_the_heads_map(run: Synthetic) -> None:
    classes, unified = classes_of_rows(Parts(run.artefacts))
    assert unified and classes.tolist() == run.unified.tolist()
    without = {stage: units for stage, units in run.artefacts.items() if stage != "fit_head"}
    apart, unified = classes_of_rows(Parts(without))
    assert not unified
    pairs = {(TASKS[t], c) for t, c in zip(run.task, run.label, strict=True)}
    assert len(set(apart.tolist())) == len(pairs)


def test_degrees_come_in_row_order_and_fall_back_to_the_scores(run: Synthetic) -> None:
    found = read_degrees(Parts(run.artefacts))
    fallback = read_degrees(Parts({"score": run.artefacts["score"]}))
    assert found is not None and fallback is not None
    assert found[0].tolist() == fallback[0].tolist() and len(found[0]) == len(run.ids)


def test_edge_recall_and_hubs_are_told_and_recorded(run: Synthetic) -> None:
    report = build_report(run.artefacts, {})
    numbers = json.loads(report.json)["numbers"]
    assert numbers["edges.recall"]["value"] == 497 / 500
    assert "Edge recall 0.9940: of 500 exact edges of a fixed sample of each of 2 joins, 497 were found." in report.html
    degrees = np.sort(np.asarray(read_degrees(Parts(run.artefacts))[0]))[::-1]  # type: ignore[index]
    share = degrees[: round(len(degrees) / 100)].sum() / degrees.sum()
    assert numbers["degree.hub_edge_share"]["value"] == pytest.approx(share)


@given(st.integers(min_value=0, max_value=10**7))
def test_degree_bins_hold_every_degree_once(largest: int) -> None:
    bins = degree_bins(largest)
    assert bins[0] == (0, 0) and bins[-1][1] >= largest
    assert all(after[0] == before[1] + 1 for before, after in itertools.pairwise(bins))


def test_risk_coverage_is_that_of_a_loop() -> None:
    outcomes = _outcomes(np.array([1.0, 0.0, 1.0, 1.0]), confidence=np.array([0.9, 0.8, 0.7, 0.6]))
    curve = risk_coverage(outcomes, "L1")
    assert curve is not None
    assert curve[0].tolist() == [0.25, 0.5, 0.75, 1.0]
    assert curve[1].tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])
    assert risk_coverage(outcomes, "L9") is None


def _results(**corrupted: float) -> Results:
    """Models by name with one corrupted level; clean accuracy is ten points higher."""
    return Results(tuple(_model(name, value) for name, value in corrupted.items()))


def _model(name: str, value: float) -> ModelResult:
    levels: Mapping[str, object] = {"clean": {"mean": {"accuracy": value + 0.1}}, "L1": {"mean": {"accuracy": value}}}
    return ModelResult(name, name, ("t",), ("clean", "L1"), {"task_known": levels}, {}, None, {}, f"evaluate/{name}")


def _outcomes(correct: np.ndarray, confidence: np.ndarray | None = None) -> Outcomes:
    n = len(correct)
    images = np.array([f"t\x1f{i}" for i in range(n)], dtype=object)
    levels = np.array(["L1"] * n, dtype=object)
    return Outcomes(images, levels, np.ones(n) if confidence is None else confidence, correct)
