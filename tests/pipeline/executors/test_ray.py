"""Units as Ray tasks: equal bytes, workers that stay, workers that die, units that fail."""

from pathlib import Path

import pytest
from eventful import Count, CountSpec, Meet, MeetToo, Recount, planned, seen
from own_stages import RESUME, clock, made_since, own_workflow, total_of
from tiny import Tiny

from pipeline.config import Resources
from pipeline.errors import ConfigError, UnitsFailed
from pipeline.executors import Executor, Outcome, RayExecutor, RaySpec, SerialExecutor
from pipeline.run import run
from pipeline.stage import Stage
from pipeline.store import Store
from pipeline.workflow import Workflow

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def outcomes(executor: Executor, stage: Stage) -> dict[str, Outcome]:
    given = planned(stage)
    executor.start(stage, given)
    ended = [executor.wait() for _ in given]
    assert {name for name, _ in ended} == {stage.name}
    return by_unit([outcome for _, outcome in ended])


def by_unit(ended: list[Outcome]) -> dict[str, Outcome]:
    assert len(ended) == len({each.unit for each in ended})
    return {each.unit: each for each in ended}


def digests(ended: dict[str, Outcome]) -> dict[str, str]:
    return {unit: outcome.artefact.digest for unit, outcome in ended.items() if outcome.artefact}


def test_units_have_equal_bytes_and_workers_stay_from_stage_to_stage(
    on_ray: RayExecutor, serial: SerialExecutor, events: Path
) -> None:
    stages = (Count(CountSpec(), events), Recount(CountSpec(), events))
    made = [digests(outcomes(on_ray, stage)) for stage in stages]
    pids = {pid for pid, event in seen(events) if event.startswith("process")}
    assert len(pids) <= 2, "a worker was started for a unit or for a stage"
    for stage in stages:
        setups = [pid for pid, event in seen(events) if event == f"setup {stage.name}"]
        assert len(setups) == len(set(setups)), "a worker set a stage up twice"
    assert made == [digests(outcomes(serial, stage)) for stage in stages]
    assert [len(each) for each in made] == [6, 6]


def test_stages_that_do_not_need_each_other_run_at_the_same_time(
    on_ray: RayExecutor, serial: SerialExecutor, events: Path
) -> None:
    stages = (Meet(CountSpec(count=1), events), MeetToo(CountSpec(count=1), events))  # each waits for the other
    for stage in stages:
        on_ray.start(stage, planned(stage))
    ended = dict(on_ray.wait() for _ in stages)
    assert set(ended) == {stage.name for stage in stages}
    assert all(outcome.artefact for outcome in ended.values()), ended
    for stage in stages:
        assert digests(outcomes(serial, stage)) == digests(by_unit([ended[stage.name]]))


def test_a_unit_whose_worker_is_killed_is_done_again_with_equal_bytes(
    on_ray: RayExecutor, serial: SerialExecutor, events: Path
) -> None:
    stage = Count(CountSpec(), events)
    (events / "lose-n-2").touch()
    made = digests(outcomes(on_ray, stage))
    tries = [pid for pid, event in seen(events) if event == "process n-2"]
    assert len(set(tries)) == len(tries) == 2
    assert made == digests(outcomes(serial, stage))
    assert len(made) == 6


def test_an_exception_of_ours_is_not_tried_again_and_siblings_finish(on_ray: RayExecutor, events: Path) -> None:
    (events / "fail-n-1").touch()
    ended = outcomes(on_ray, Count(CountSpec(), events))
    assert [event for _, event in seen(events)].count("process n-1") == 1
    assert set(digests(ended)) == {"n-0", "n-2", "n-3", "n-4", "n-5"}
    failure = ended["n-1"]
    assert failure.error == "n-1 is in trouble; remove fail-n-1" and failure.exit_code == 2
    assert failure.log is not None and "DataError" in failure.log.read_text()


def test_a_stage_that_wants_more_than_a_node_has_is_told_the_option(on_ray: RayExecutor, events: Path) -> None:
    stage = Count(CountSpec(), events, Resources(cpus=3))
    with pytest.raises(ConfigError, match=r"resources\.count\.cpus: a unit wants 3 CPU, the largest node .* has 1"):
        outcomes(on_ray, stage)
    with pytest.raises(ConfigError, match=r"resources\.count\.gpus: a unit wants 1 GPU"):
        outcomes(on_ray, Count(CountSpec(), events, Resources(gpus=1)))
    assert seen(events) == []


def test_a_failed_unit_fails_the_run_and_the_same_command_goes_on(joined: RaySpec, tiny_project: Tiny) -> None:
    def workflow() -> Workflow:
        made = own_workflow(tiny_project)
        made.config = made.config.model_copy(update={"executor": joined})
        return made

    (tiny_project.root / "fail-n-1").touch()
    with pytest.raises(UnitsFailed, match=r"numbers: 1 of 4 units failed; first \(n-1\): n-1 is in trouble") as failure:
        run(workflow(), RESUME)
    assert RESUME in str(failure.value)
    store = Store(tiny_project.root / "store")
    assert {manifest.unit for _, manifest in store.units()} == {"n-0", "n-2", "n-3"}

    (tiny_project.root / "fail-n-1").unlink()
    began = clock()
    assert total_of(run(workflow(), RESUME), store) == 0 + 1 + 4 + 9
    assert "numbers/n-1" in made_since(store, began) and "numbers/n-0" not in made_since(store, began)
