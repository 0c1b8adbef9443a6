"""Fits as Ray Train jobs: equal bytes to the plain loop, also after a worker was lost; failures of ours end them."""

from pathlib import Path

import pytest
from eventful import CHECKPOINT_EVERY, STEPS, TROUBLE_AT, FitLine, LineSpec, planned, seen

from pipeline.config import Resources
from pipeline.errors import ConfigError
from pipeline.executors import Executor, Outcome, RayExecutor, SerialExecutor
from pipeline.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def fitted(executor: Executor, stage: FitLine) -> Outcome:
    (unit,) = planned(stage)
    executor.start(stage, [unit])
    name, outcome = executor.wait()
    assert (name, outcome.unit) == (stage.name, unit.unit.id)
    return outcome


def digest(outcome: Outcome) -> str:
    assert outcome.artefact is not None, outcome.error
    return outcome.artefact.digest


def steps_of(events: Path, rank: int) -> dict[int, int]:
    """{process: steps it did} of the workers of one rank, in the order in which they began."""
    counts: dict[int, int] = {}
    for pid, event in seen(events):
        if event == f"step of rank {rank}":
            counts[pid] = counts.get(pid, 0) + 1
    return counts


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    return Store(tmp_path / "ray").root / ".ray_train"


def test_a_fit_that_lost_its_worker_goes_on_from_its_checkpoint_with_equal_bytes(
    on_ray: RayExecutor, serial: SerialExecutor, events: Path, jobs: Path
) -> None:
    (events / "lose-line").touch()
    stage = FitLine(LineSpec(), events)
    made = digest(fitted(on_ray, stage))
    first, second = steps_of(events, 0).values()
    # The last checkpoint before the end may not have been taken note of.
    assert first == TROUBLE_AT + 1 and second in (STEPS - CHECKPOINT_EVERY, STEPS - 2 * CHECKPOINT_EVERY)
    assert list(jobs.iterdir()) == [], "what Ray kept for resuming outlived its fit"
    assert made == digest(fitted(serial, stage))


def test_two_workers_give_the_bytes_of_one_process_that_does_both_parts(
    on_ray: RayExecutor, serial: SerialExecutor, events: Path
) -> None:
    stage = FitLine(LineSpec(workers=2), events)
    made = digest(fitted(on_ray, stage))
    assert [list(steps_of(events, rank).values()) for rank in (0, 1)] == [[STEPS], [STEPS]]
    assert made == digest(fitted(serial, stage))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_of_ours_ends_a_fit_at_once(workers: int, on_ray: RayExecutor, events: Path) -> None:
    (events / "fail-line").touch()
    outcome = fitted(on_ray, FitLine(LineSpec(workers=workers), events))
    assert outcome.artefact is None and outcome.error == "line is in trouble; remove fail-line"
    assert outcome.exit_code == 2 and outcome.log is not None and "DataError" in outcome.log.read_text()
    assert list(steps_of(events, workers - 1).values()) == [TROUBLE_AT + 1]


def test_more_workers_than_the_cluster_has_cpus_for_are_refused(on_ray: RayExecutor, events: Path) -> None:
    stage = FitLine(LineSpec(workers=3), events, Resources(cpus=1))
    with pytest.raises(ConfigError, match=r"fit_line\.workers: 3 workers with resources\.fit_line\.cpus=1 each"):
        fitted(on_ray, stage)
