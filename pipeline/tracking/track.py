"""Writing a run into MLflow: again and again without a duplicate, and never at the price of the run."""

import logging
import os
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline import logs
from pipeline.record import RunRecord
from pipeline.store import Artefact
from pipeline.tracking.content import CHILD_TAG, KEY_TAG, RUN_TAG, Point, TrackedRun, span_ms, tracked_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PROBE_TIMEOUT_S = 3.0
SQLITE = b"SQLite format 3\0"  # how such a file begins, an empty one aside
METRICS_A_BATCH, PARAMS_A_BATCH = 1000, 100  # MLflow's limits
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # A server that hangs fails the first request and ends the attempt; nothing waits for each of a hundred.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}


def track_run(
    record: RunRecord, artefacts: Mapping[str, Sequence[Artefact]], *, uri: str, experiment: str
) -> str | None:
    """Where the run can be seen, or None (with a warning that says why) when the tracker could not be used.

    One parent run, a child for each fitted unit and evaluated model. Tracking the same run again updates what is there.
    """
    began = perf_counter()
    place = shown(uri)
    try:
        _probe(uri)
        with _quiet():
            address, children = _write(record, artefacts, uri, experiment)
    except _failures() as error:
        logs.fact(
            "tracking failed, the run itself is complete and stored",
            level=logging.WARNING,
            tracker=place,
            error=_one_line(error, uri),
            next=f"bd-merge track {record.run_id}",
        )
        return None
    logs.fact("tracked", run=record.run_id, tracker=place, children=children, seconds=perf_counter() - began)
    return address


def warm_up(uri: str) -> None:
    """Import MLflow and open the tracker, so that tracking a run later finds both ready. Says nothing if it fails."""
    try:
        _probe(uri)
        with _quiet():
            _client(uri).search_experiments(max_results=1)
    except _failures():
        return  # `track_run` meets the same and reports it


def shown(uri: str) -> str:
    """The address without the user and password it may hold."""
    parts = urlsplit(uri)
    return uri.replace(f"{parts.netloc.rpartition('@')[0]}@", "") if "@" in parts.netloc else uri


def _write(
    record: RunRecord, artefacts: Mapping[str, Sequence[Artefact]], uri: str, experiment: str
) -> tuple[str, int]:
    client = _client(uri)
    experiment_id = _experiment(client, uri, experiment)
    existing = _existing(client, experiment_id, record.run_id)
    parent_id, children = "", 0
    for tracked in tracked_runs(record, artefacts):
        run_id = _write_one(client, experiment_id, record, tracked, existing.get(tracked.child), parent_id)
        parent_id = parent_id or run_id
        children += bool(tracked.child)
    if urlsplit(uri).scheme in ("http", "https"):
        return f"{shown(uri).rstrip('/')}/#/experiments/{experiment_id}/runs/{parent_id}", children
    return f"{shown(uri)} (run {parent_id}; look with `mlflow ui --backend-store-uri {shown(uri)}`)", children


def _write_one(
    client: "MlflowClient",
    experiment_id: str,
    record: RunRecord,
    tracked: TrackedRun,
    old: "Run | None",
    parent_id: str,
) -> str:
    """The id of the MLflow run that now holds `tracked`."""
    from mlflow.entities import Metric, Param, RunTag

    began, ended = span_ms(record)
    if old is not None and old.data.tags.get(KEY_TAG) != tracked.tags.get(KEY_TAG):
        # Another key is another unit: its params may differ, and MLflow never changes a param.
        client.delete_run(old.info.run_id)
        old = None
    tags = {RUN_TAG: record.run_id, CHILD_TAG: tracked.child, **tracked.tags}
    if tracked.child:
        tags["mlflow.parentRunId"] = parent_id
    if old is None:
        old = client.create_run(experiment_id, start_time=began, tags=tags, run_name=tracked.title)
    run_id: str = old.info.run_id
    known = old.data.params
    params = [Param(name, value) for name, value in tracked.params.items() if name not in known]
    # Equal name, step, time and value is one row: writing the same points again leaves one of each.
    metrics = [Metric(p.name, p.value, ended, p.step) for p in _unique(tracked.points)]
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
    for start in range(0, len(params), PARAMS_A_BATCH):
        client.log_batch(run_id, params=params[start : start + PARAMS_A_BATCH])
    for start in range(0, len(metrics), METRICS_A_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_A_BATCH])
    for path, folder in tracked.files:
        client.log_artifact(run_id, str(path), folder or None)
    client.set_terminated(run_id, "FINISHED", end_time=ended)
    return run_id


def _client(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    # The level is MLflow's to set on import, so it is ours to lower only now.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """The experiment's id; a local one keeps its artifacts beside its database, a server's where the server says."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        identity: str = found.experiment_id
        return identity
    database = _sqlite_path(uri)
    made: str = client.create_experiment(name, (database.parent / "mlflow").as_uri() if database else None)
    return made


def _existing(client: "MlflowClient", experiment_id: str, run_id: str) -> dict[str, "Run"]:
    """{child name: MLflow run} of what an earlier attempt wrote; the parent under the empty name."""
    found: dict[str, Run] = {}
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{run_id}'", max_results=500, page_token=token)
        for run in page:
            found.setdefault(run.data.tags.get(CHILD_TAG, ""), run)
        token = page.token
        if not token:
            return found


def _unique(points: list[Point]) -> list[Point]:
    return list({(point.name, point.step): point for point in points}.values())


def _probe(uri: str) -> None:
    """`OSError` at once where MLflow would retry for minutes: nobody listens, or a database has no folder."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), timeout=PROBE_TIMEOUT_S):
            return
    database = _sqlite_path(uri)
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(database if database.exists() else database.parent, os.W_OK):
            raise PermissionError(f"{database} cannot be written")
        if database.exists() and _first_bytes(database) not in (SQLITE, b""):
            raise OSError(f"{database} is no sqlite database; move it away")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(SQLITE))


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def _failures() -> tuple[type[Exception], ...]:
    """What a tracker that is down, full, locked, foreign or not installed raises; our own mistakes pass through."""
    try:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        return (OSError, ImportError)
    return (OSError, MlflowException, SQLAlchemyError)


def _one_line(error: Exception, uri: str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text.replace(uri, shown(uri))[:300]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow without telemetry, long retries or its libraries' deprecation notes; the environment is put back."""
    before: dict[str, Any] = {name: os.environ.get(name) for name in SETTINGS}
    os.environ.update({name: os.environ.get(name) or value for name, value in SETTINGS.items()})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
