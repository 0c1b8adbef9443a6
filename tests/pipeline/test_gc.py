"""gc: removes what no run pins, and nothing that any run still needs."""

import json
import time
from pathlib import Path

import pytest
from own_stages import NumbersSpec, SquareSpec, clock, made_since, run_own, snapshot
from processes import bd_merge
from tiny import Tiny

from pipeline.errors import UnitsFailed
from pipeline.gc import collect
from pipeline.record import run_ids
from pipeline.store import Store


@pytest.fixture
def store(tiny_project: Tiny) -> Store:
    return Store(tiny_project.root / "store")


def removed_units(store: Store, **options: object) -> set[str]:
    removed = collect(store, **options)  # type: ignore[arg-type]
    return {each.path.relative_to(store.root).as_posix().rpartition("-")[0] for each in removed}


def test_what_a_run_pins_stays_and_what_it_no_longer_uses_goes(tiny_project: Tiny, store: Store) -> None:
    run_own(tiny_project)
    assert collect(store) == []
    run_own(tiny_project, squares=SquareSpec(power=3))  # the same run id: our specs are none of its configuration
    old = {*(f"squares/n-{i}" for i in range(4)), "total/total"}
    before = snapshot(store.root)
    assert removed_units(store, dry_run=True) == old
    assert snapshot(store.root) == before
    assert removed_units(store) == old
    began = clock()
    run_own(tiny_project, squares=SquareSpec(power=3))
    assert made_since(store, began) == set()
    run_own(tiny_project)
    assert made_since(store, began) == old


def test_units_that_two_runs_share_stay_until_both_are_forgotten(tiny_project: Tiny, store: Store) -> None:
    first = run_own(tiny_project)
    time.sleep(0.01)  # runs are ordered by the time of their records
    second = run_own(tiny_project, seed=1)
    assert run_ids(store) == [first.run_id, second.run_id]
    assert collect(store) == []
    assert removed_units(store, keep_runs=1) == {"runs/tiny", *(f"numbers/n-{i}" for i in range(4))}
    assert run_ids(store) == [second.run_id]
    began = clock()
    run_own(tiny_project, seed=1)
    assert made_since(store, began) == set()
    collect(store, keep_runs=0)
    assert run_ids(store) == [] and list(store.units()) == []


def test_what_a_failed_run_finished_stays(tiny_project: Tiny, store: Store) -> None:
    (tiny_project.root / "fail-n-1").touch()
    with pytest.raises(UnitsFailed):
        run_own(tiny_project)
    assert collect(store) == []
    (tiny_project.root / "fail-n-1").unlink()
    began = clock()
    run_own(tiny_project)
    assert "numbers/n-0" not in made_since(store, began)


def test_what_the_last_whole_run_made_stays_while_the_next_one_is_unfinished(tiny_project: Tiny, store: Store) -> None:
    run_own(tiny_project)
    (tiny_project.root / "fail-n-4").touch()
    with pytest.raises(UnitsFailed):
        run_own(tiny_project, numbers=NumbersSpec(count=5))
    assert collect(store) == []


def test_leftovers_go_and_the_state_of_an_awaited_fit_stays(tiny_project: Tiny, store: Store) -> None:
    (tiny_project.root / "fail-n-1").touch()
    with pytest.raises(UnitsFailed):
        run_own(tiny_project)
    pins = json.loads((store.root / "runs" / run_ids(store)[0] / "run.json").read_text())["stages"]["numbers"]
    awaited = [
        store.state_directory("numbers", "n-1", pins["n-1"]),
        store.root / ".ray_train" / f"numbers-n-1-{pins['n-1'][:12]}",
    ]
    useless = [
        store.root / "numbers" / ".tmp-n-1-0123456789ab-01234567",
        store.root / "numbers" / ".damaged-n-1-0123456789ab",
        store.root / "numbers" / ".state-n-1-0123456789ab",
        store.state_directory("numbers", "n-0", pins["n-0"]),  # its unit is there already
        store.root / ".ray_train" / "numbers-n-1-0123456789ab",
    ]
    torn = store.directory("numbers", "n-7", "0123456789abcdef")
    for directory in (*awaited, *useless, torn):
        directory.mkdir(parents=True)
        (directory / "state.pt").write_bytes(b"state")
    (torn / "manifest.json").write_text('{"schema": 1, "sta')
    assert {each.path for each in collect(store)} == {*useless, torn}
    assert all(path.is_dir() for path in awaited) and not any(path.exists() for path in (*useless, torn))


def test_folders_that_are_no_units_are_left_alone(tiny_project: Tiny, store: Store) -> None:
    mine = store.root / "holiday" / "pictures"
    mine.mkdir(parents=True)
    (mine / "beach.png").write_bytes(b"png")
    run_own(tiny_project)
    collect(store, keep_runs=0)
    assert (mine / "beach.png").is_file()


def test_the_command_says_what_it_removes(tiny_project: Tiny, store: Store, tmp_path: Path) -> None:
    run_own(tiny_project)
    command = ["gc", "--store", store.root, "--keep", "0"]
    ended = bd_merge(*command, "--dry-run", output=tmp_path / "output")
    assert ended.exit_code == 0 and "10 would be removed" in ended.output and len(list(store.units())) == 9
    ended = bd_merge(*command, output=tmp_path / "output")
    assert ended.exit_code == 0 and "10 removed" in ended.output and list(store.units()) == []
    ended = bd_merge("gc", "--store", tmp_path / "nowhere", output=tmp_path / "output")
    assert ended.exit_code == 2 and "does not exist" in ended.output and not (tmp_path / "nowhere").exists()
