"""A run in a real MLflow on a local sqlite file: complete, written twice without a duplicate, and never fatal."""

import logging
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from synthetic_run import TITLES, Synthetic

from pipeline.logs import LOGGER
from pipeline.record import RunRecord
from pipeline.store import Store
from pipeline.tracking import track_run
from pipeline.tracking.content import CHILD_TAG, PARAM_VALUE_CHARS, metric_name, params_of, tracked_runs
from pipeline.tracking.track import shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

FITTED = 1 + 4 + 1 + 2 + 1  # base, experts, head, routers, AdaMerging


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our log lines reach `caplog` even after a test that configured the logger."""
    monkeypatch.setattr(LOGGER, "propagate", True)


@pytest.fixture(scope="session")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Synthetic, str]:
    """A run that was tracked twice."""
    run = Synthetic(Store(tmp_path_factory.mktemp("tracked")))
    page = "<!DOCTYPE html><title>report</title>"
    run.add("report", "report", {"report.html": page, "figures/timing.png": "PNG"})
    uri = f"sqlite:///{run.store.root / 'mlflow.db'}"
    for _ in range(2):
        assert track_run(RunRecord(**run.record), run.artefacts, uri=uri, experiment="tests") is not None
    return run, uri


def test_parent_and_children_are_there_once(tracked: tuple[Synthetic, str]) -> None:
    with _client(tracked[1]) as client:
        runs = _runs(client)
        children = [run for run in runs if run.data.tags[CHILD_TAG]]
        (parent,) = (run for run in runs if not run.data.tags[CHILD_TAG])
        assert len(children) == FITTED + len(TITLES)
        assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
        assert {run.info.status for run in runs} == {"FINISHED"}


def test_params_metrics_tags_and_files_are_those_of_the_store(tracked: tuple[Synthetic, str]) -> None:
    run, uri = tracked
    with _client(uri) as client:
        runs = {each.data.tags[CHILD_TAG]: each for each in _runs(client)}
        parent, child = runs[""], runs["evaluate/bd_layer"]
        assert parent.data.params["fit_router.eta"] == "0.1"
        (unit,) = (a for a in run.artefacts["evaluate"] if a.unit == "bd_layer")
        assert child.data.tags["bd.key"] == unit.key
        assert child.data.metrics["task_known/L3/accuracy"] == parent.data.metrics["bd_layer/task_known/L3/accuracy"]
        assert parent.data.metrics["time/base/wall_s"] == 92.0
        assert [f.path for f in client.list_artifacts(parent.info.run_id, "figures")] == ["figures/timing.png"]
        assert "report.html" in [f.path for f in client.list_artifacts(parent.info.run_id)]


def test_curves_keep_their_steps_and_are_not_written_twice(tracked: tuple[Synthetic, str]) -> None:
    with _client(tracked[1]) as client:
        (head,) = (run for run in _runs(client) if run.data.tags[CHILD_TAG] == "fit_head/head")
        steps = [point.step for point in client.get_metric_history(head.info.run_id, "loss/l_ent")]
        assert len(steps) == len(set(steps)) == 200 and min(steps) == 0 and max(steps) == 299


def test_artifacts_lie_in_the_store(tracked: tuple[Synthetic, str]) -> None:
    run, _ = tracked
    assert list((run.store.root / "mlflow").rglob("report.html"))


def test_a_unit_with_another_key_replaces_its_child(tracked: tuple[Synthetic, str], tmp_path: Path) -> None:
    run, uri = tracked
    other = Synthetic(Store(tmp_path), seed=5)
    renewed = {**run.artefacts, "fit_head": other.artefacts["fit_head"]}
    assert track_run(RunRecord(**run.record), renewed, uri=uri, experiment="replaced") is not None
    assert track_run(RunRecord(**run.record), run.artefacts, uri=uri, experiment="replaced") is not None
    with _client(uri) as client:
        heads = [each for each in _runs(client, "replaced") if each.data.tags[CHILD_TAG] == "fit_head/head"]
        assert [each.data.tags["bd.key"] for each in heads] == [run.artefacts["fit_head"][0].key]


@pytest.mark.parametrize("uri", ["http://name:secret@127.0.0.1:9", "sqlite:////proc/none/mlflow.db"])
def test_a_tracker_that_is_down_costs_a_warning(run: Synthetic, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert track_run(RunRecord(**run.record), run.artefacts, uri=uri, experiment="tests") is None
    assert time.monotonic() - began < 10
    assert f"bd-merge track {run.record['run_id']}" in caplog.text and "secret" not in caplog.text


def test_a_server_that_never_answers_does_not_hold_the_run(
    run: Synthetic, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent, caplog.at_level(logging.WARNING):
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        assert track_run(RunRecord(**run.record), run.artefacts, uri=uri, experiment="tests") is None
    assert time.monotonic() - began < 20 and "tracking failed" in caplog.text


def test_a_file_that_is_no_database_costs_a_warning(
    run: Synthetic, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlflow.db").write_text("not a database", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
        assert track_run(RunRecord(**run.record), run.artefacts, uri=uri, experiment="tests") is None
    assert "tracking failed" in caplog.text


def test_the_environment_is_put_back(tracked: tuple[Synthetic, str]) -> None:
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


def test_names_and_values_stay_within_what_mlflow_takes(run: Synthetic) -> None:
    assert metric_name("task@known", "a/b", "..") == "task_known/a_b/_"
    cut = params_of({"long": "x" * 10_000, "we@ird": 1})
    assert len(cut["long"]) == PARAM_VALUE_CHARS and cut["we_ird"] == "1"
    names = {point.name for each in tracked_runs(RunRecord(**run.record), run.artefacts) for point in each.points}
    assert names and not any("@" in name for name in names)


def test_addresses_are_shown_without_credentials() -> None:
    assert shown("http://name:secret@host:5000/x") == "http://host:5000/x"
    assert shown("sqlite:////store/mlflow.db") == "sqlite:////store/mlflow.db"


@contextmanager
def _client(uri: str) -> Iterator["MlflowClient"]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own libraries
        from mlflow import MlflowClient

        yield MlflowClient(tracking_uri=uri)


def _runs(client: "MlflowClient", experiment: str = "tests") -> list["Run"]:
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id], max_results=1000))
