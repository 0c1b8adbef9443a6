"""The run loop: does what is missing, nothing else, and says what failed and how to go on."""

import os
import time
from pathlib import Path

import pytest
from finished import Finished
from own_stages import (
    RESUME,
    FailingFirst,
    Letters,
    NumbersSpec,
    SquareSpec,
    clock,
    made_since,
    own_workflow,
    run_own,
    snapshot,
    total_of,
)
from processes import bd_merge
from tiny import Tiny

from pipeline.config import Resources, Spec
from pipeline.errors import UnitsFailed
from pipeline.run import resume_command, run
from pipeline.store import Store
from pipeline.workflow import Workflow

ALL = {*(f"{stage}/n-{i}" for stage in ("numbers", "squares") for i in range(4)), "total/total"}


@pytest.fixture
def store(tiny_project: Tiny) -> Store:
    return Store(tiny_project.root / "store")


def test_a_second_run_does_nothing_and_ends_at_once(finished_copy: Finished, tmp_path: Path) -> None:
    command = ["run", finished_copy.config]
    assert bd_merge(*command, output=tmp_path / "first").exit_code == 0  # another path, so another run: its record
    before, began = snapshot(finished_copy.path), time.perf_counter()
    ended = bd_merge(*command, output=tmp_path / "output")
    assert ended.exit_code == 0 and time.perf_counter() - began < 5
    assert "nothing to do, every unit is in the store" in ended.output
    assert snapshot(finished_copy.path) == before


def test_units_are_made_once_and_pinned(tiny_project: Tiny, store: Store) -> None:
    record = run_own(tiny_project)
    assert total_of(record, store) == 0 + 1 + 4 + 9
    assert {f"{stage}/{unit}" for stage, units in record.stages.items() for unit in units} == ALL
    before = snapshot(store.root)
    assert run_own(tiny_project) == record
    assert snapshot(store.root) == before


def test_a_failing_unit_does_not_stop_its_siblings_and_the_same_command_finishes(
    tiny_project: Tiny, store: Store
) -> None:
    for unit in ("n-1", "n-2"):
        (tiny_project.root / f"fail-{unit}").touch()
    began = clock()
    with pytest.raises(UnitsFailed) as caught:
        run_own(tiny_project)
    message = str(caught.value)
    log = store.root / "logs" / Workflow.load(tiny_project.write(seed=0)).name
    assert message.startswith("numbers: 2 of 4 units failed; first (n-1): n-1 is in trouble; remove fail-n-1\n")
    assert message.endswith(f"what succeeded is kept; resume with:\n  {RESUME}")
    logs = [Path(line.strip()) for line in message.splitlines() if line.strip().startswith(str(log.parent))]
    assert [path.name for path in logs] == ["numbers-n-1.log", "numbers-n-2.log"]
    assert all("DataError: n-" in path.read_text() and "Traceback" in path.read_text() for path in logs)
    assert made_since(store, began) == {"numbers/n-0", "numbers/n-3"}
    assert store.passing() == []

    for unit in ("n-1", "n-2"):
        (tiny_project.root / f"fail-{unit}").unlink()
    began = clock()
    record = run_own(tiny_project)
    assert made_since(store, began) == ALL - {"numbers/n-0", "numbers/n-3"}
    assert total_of(record, store) == 14


def test_after_a_failed_stage_nothing_else_begins(tiny_project: Tiny, store: Store) -> None:
    (tiny_project.root / "fail-n-0").touch()
    workflow = own_workflow(tiny_project)
    workflow.stages.append(Letters(Spec()))  # waits behind the numbers
    with pytest.raises(UnitsFailed, match="numbers: 1 of 4 units failed"):
        run(workflow, RESUME)
    assert {f"{m.stage}/{m.unit}" for _, m in store.units()} == {"numbers/n-1", "numbers/n-2", "numbers/n-3"}


def test_what_is_under_way_beside_a_failed_stage_ends_and_is_kept(tiny_project: Tiny, store: Store) -> None:
    (tiny_project.root / "fail-n-0").touch()
    workflow = own_workflow(tiny_project)
    workflow.stages.insert(0, Letters(Spec()))
    with pytest.raises(UnitsFailed, match="numbers: 1 of 4 units failed"):
        run(workflow, RESUME)
    assert "letters/letters" in {f"{m.stage}/{m.unit}" for _, m in store.units()}


def test_every_failed_stage_is_named(tiny_project: Tiny) -> None:
    for name in ("fail-n-0", "fail-letters"):
        (tiny_project.root / name).touch()
    workflow = own_workflow(tiny_project)
    letters = Letters(Spec())
    letters.trouble, letters.count = tiny_project.root, 2
    workflow.stages.insert(0, letters)
    workflow.executor = lambda *given: FailingFirst(*given)  # type: ignore[method-assign]
    with pytest.raises(UnitsFailed, match="units of numbers failed as well") as caught:
        run(workflow, RESUME)
    assert str(caught.value).startswith("letters: 2 of 2 units failed; first (letters)")


def test_a_lost_row_fails_the_unit(tiny_project: Tiny, store: Store) -> None:
    (tiny_project.root / "lose-n-3").touch()
    with pytest.raises(UnitsFailed, match="numbers n-3 lost rows") as caught:
        run_own(tiny_project)
    assert caught.value.exit_code == 1
    assert [m.unit for _, m in store.units()] == ["n-0", "n-1", "n-2"]


def test_a_stage_is_set_up_once_for_all_its_units(tiny_project: Tiny) -> None:
    workflow = own_workflow(tiny_project)
    run(workflow, RESUME)
    assert vars(workflow.stages[1])["setups"] == 1


def test_a_change_costs_what_depends_on_it(tiny_project: Tiny, store: Store) -> None:
    run_own(tiny_project)
    began = clock()
    assert total_of(run_own(tiny_project, squares=SquareSpec(power=3)), store) == 36
    assert made_since(store, began) == {*(f"squares/n-{i}" for i in range(4)), "total/total"}

    began = clock()
    assert total_of(run_own(tiny_project, numbers=NumbersSpec(count=5)), store) == 30
    assert made_since(store, began) == {"numbers/n-4", "squares/n-4", "total/total"}

    began = clock()
    run_own(tiny_project, resources=Resources(threads=2, batch_size=1))
    run_own(tiny_project, squares=SquareSpec(power=3))
    assert made_since(store, began) == set()


def test_equal_bytes_upstream_stop_the_recomputation(tiny_project: Tiny, store: Store) -> None:
    run_own(tiny_project)
    began = clock()
    run_own(tiny_project, seed=1)  # the seed counts in the key of the numbers and changes no byte of them
    assert made_since(store, began) == {f"numbers/n-{i}" for i in range(4)}


def test_a_damaged_unit_is_set_aside_and_made_again(tiny_project: Tiny, store: Store) -> None:
    record = run_own(tiny_project)
    broken = record.artefacts(store)["squares"][2]
    broken.file("square.json").write_bytes(b"")
    began = clock()
    again = run_own(tiny_project)
    assert made_since(store, began) == {"squares/n-2"}
    aside = broken.path.with_name(f".damaged-{broken.path.name}")
    assert (aside / "square.json").read_bytes() == b""
    assert again.artefacts(store)["squares"][2].digest == broken.digest
    run_own(tiny_project)
    assert not aside.exists()


def test_what_a_dead_run_left_is_swept(tiny_project: Tiny, store: Store) -> None:
    orphan = store.root / "squares" / ".tmp-n-0-0123456789ab-01234567"
    orphan.mkdir(parents=True)
    (orphan / "half").write_bytes(b"half")
    run_own(tiny_project)
    assert not orphan.exists() and store.passing() == []


def test_the_resume_command_can_be_typed_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/venv/bin/bd-merge", "run", "my configs/a.yaml", "fit_router.variants=[task]"])
    assert resume_command() == "bd-merge run 'my configs/a.yaml' 'fit_router.variants=[task]'"


def test_touching_an_image_costs_its_shard_and_nothing_after_it(finished_copy: Finished) -> None:
    image = next((finished_copy.tiny.root / "images" / "low" / "train").rglob("*.png"))
    os.utime(image)
    began = clock()
    run(Workflow.load(finished_copy.config), RESUME)
    assert made_since(finished_copy.store, began) == {"shard/low-train-00000"}


def test_a_new_image_costs_its_shard_its_embedding_and_what_depends_on_all(finished_copy: Finished) -> None:
    images = finished_copy.tiny.root / "images"
    new = (images / "high" / "test" / "two" / "000.png").read_bytes()
    (images / "low" / "train" / "two" / "900.png").write_bytes(new)  # the last of its task: it goes into shard 1
    began = clock()
    workflow = Workflow.load(finished_copy.config)
    workflow.stages = workflow.stages[:12]  # up to the pairs; everything after them depends on all of them
    run(workflow, RESUME)
    made = made_since(finished_copy.store, began)
    everywhere = {f"{task}-train-0000{number}" for task in ("low", "high") for number in (0, 1)}
    own = {"shard/low-train-00001", "embed/low-train-00001"}
    # The radius comes out as it was, so of the joins only those with the new image's partition are made.
    joins = {f"edges/{first}low-train-00001" for first in ("high-train-00000--", "high-train-00001--", "")}
    shared = {"fit_head/head", "radius/radius", "threshold/epsilon", *joins}
    parts = {f"{stage}/{unit}" for stage in ("neighbours", "score", "pairs") for unit in everywhere}
    assert made == own | shared | parts


def test_a_checkpoint_cut_short_stops_the_command_and_its_repair_costs_its_import(
    finished_copy: Finished, tmp_path: Path
) -> None:
    expert = finished_copy.tiny.root / "models" / "high.safetensors"
    whole = expert.read_bytes()
    expert.write_bytes(whole[: len(whole) // 2])
    ended = bd_merge("run", finished_copy.config, output=tmp_path / "output")
    assert ended.exit_code == 2 and "high.safetensors" in ended.output and "Traceback" not in ended.output
    expert.write_bytes(whole)
    began = clock()
    assert bd_merge("run", finished_copy.config, output=tmp_path / "output").exit_code == 0
    assert made_since(finished_copy.store, began) == {"experts/high"}


def test_a_run_is_tracked_when_it_has_ended_and_a_second_one_leaves_it_alone(tiny_project: Tiny, store: Store) -> None:
    record = run(tracked_workflow(tiny_project), RESUME)
    assert record.tracked is not None and str(store.root / "mlflow.db") in record.tracked
    before = snapshot(store.root)
    assert run(tracked_workflow(tiny_project), RESUME) == record
    assert snapshot(store.root) == before


@pytest.mark.parametrize("blocked", ["directory", "other file"])
def test_a_tracker_that_is_down_costs_a_warning_and_not_the_run(
    tiny_project: Tiny, store: Store, caplog: pytest.LogCaptureFixture, blocked: str
) -> None:
    database = store.root / "mlflow.db"
    if blocked == "directory":
        database.mkdir(parents=True)
    else:
        database.parent.mkdir(parents=True)
        database.write_text("not what MLflow takes")
    record = run(tracked_workflow(tiny_project), RESUME)
    assert record.tracked is None and record.finished is not None and total_of(record, store) == 14
    assert "tracking failed, the run itself is complete and stored" in caplog.text


def tracked_workflow(tiny: Tiny) -> Workflow:
    workflow = own_workflow(tiny)
    workflow.tracks = True
    return workflow
