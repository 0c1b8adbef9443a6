"""Run records: what a run pins, and what is read from them: status, doctor, compare."""

import json
from pathlib import Path

import pytest
from finished import Finished
from own_stages import run_own
from processes import bd_merge
from tiny import Tiny

from pipeline.errors import ConfigError, DataError, UnitsFailed
from pipeline.record import read_record, run_ids
from pipeline.run import run
from pipeline.store import Store
from pipeline.workflow import Workflow


def test_a_finished_run_pins_every_unit_and_says_what_made_it(finished_store: Finished) -> None:
    record = read_record(finished_store.store, finished_store.run_id)
    pinned = {(stage, unit, key) for stage, units in record.stages.items() for unit, key in units.items()}
    assert pinned == {(m.stage, m.unit, m.key) for _, m in finished_store.store.units()}
    assert record.config["fit_head"]["steps"] == 6 and record.config["executor"] == {"kind": "serial"}
    assert record.finished is not None and record.created <= record.finished
    assert "torch" in record.versions
    timed = [entry["stage"] for entry in record.timing]
    assert timed[0] == "executor start" and timed[-2:] == ["tracking", "total"]
    worked = {stage: len(units) for stage, units in record.stages.items() if units}  # an exact join needs no index
    assert set(timed[1:-2]) == set(worked)
    found = record.artefacts(finished_store.store)
    assert {stage: len(units) for stage, units in found.items()} == worked


def test_the_id_follows_from_what_counts(tiny_project: Tiny) -> None:
    def run_id(*overrides: str) -> str:
        from pipeline.record import RunRecord

        workflow = Workflow.load(tiny_project.write(), overrides)
        return RunRecord.begin(workflow.name, workflow.described(), workflow.hashed()).run_id

    own = run_id()
    assert own.startswith("tiny-")
    for speed in ("store=/elsewhere", "executor.kind=ray", "resources.embed.threads=2", "tracking.enabled=true"):
        assert run_id(speed) == own
    for bytes_ in ("seed=1", "fit_head.steps=7", "name=other", "corrupt.levels.L2=3"):
        assert run_id(bytes_) != own


def test_a_record_is_found_by_the_beginning_of_its_id(tiny_project: Tiny) -> None:
    store = Store(tiny_project.root / "store")
    first, second = run_own(tiny_project), run_own(tiny_project, seed=1)
    assert read_record(store, first.run_id) == first
    assert read_record(store, second.run_id[:-1]).run_id == second.run_id
    with pytest.raises(ConfigError, match=f"2 runs' record matches 'tiny'.*{first.run_id}"):
        read_record(store, "tiny")
    with pytest.raises(ConfigError, match="no record matches 'other'"):
        read_record(store, "other")


def test_an_unreadable_record_is_named(tiny_project: Tiny) -> None:
    store = Store(tiny_project.root / "store")
    record = run_own(tiny_project)
    (store.run_directory(record.run_id) / "run.json").write_text('{"run_id": ')
    with pytest.raises(DataError, match=r"run\.json: not a readable run record"):
        read_record(store, record.run_id)


def test_a_pinned_unit_that_is_gone_is_named(tiny_project: Tiny) -> None:
    store = Store(tiny_project.root / "store")
    record = run_own(tiny_project)
    gone = record.artefacts(store)["total"][0]
    gone.file("total.json").unlink()
    with pytest.raises(DataError, match=f"{gone.path} is gone or damaged; run it again"):
        record.artefacts(store)


def test_status_tells_finished_from_interrupted(tiny_project: Tiny, tmp_path: Path) -> None:
    store = Store(tiny_project.root / "store")
    done = run_own(tiny_project)
    (tiny_project.root / "fail-n-2").touch()
    with pytest.raises(UnitsFailed):
        run_own(tiny_project, seed=1)
    ended = bd_merge("status", "--store", store.root, output=tmp_path / "output")
    lines = {line.split()[1]: line for line in ended.output.splitlines() if line.startswith("│ tiny-")}
    assert ended.exit_code == 0 and list(lines) == run_ids(store)
    assert str(done.finished) in lines[done.run_id] and " 9 " in lines[done.run_id]
    unfinished = next(line for name, line in lines.items() if name != done.run_id)
    assert "not yet; the same command resumes it" in unfinished and "3 of 4" in unfinished
    assert "12 units" in ended.output


def test_compare_puts_two_runs_side_by_side(finished_copy: Finished, tmp_path: Path) -> None:
    run(Workflow.load(finished_copy.config), "first")
    other = Workflow.load(finished_copy.config, ["evaluate.bins=7", "name=seven"])
    other.stages = other.stages[:-2]  # what compare reads is there after evaluate
    run(other, "other")
    store = finished_copy.store
    ids = [name for name in run_ids(store) if read_record(store, name).config["store"] == str(store.root)]
    ended = bd_merge("compare", *ids, "--store", store.root, output=tmp_path / "output")
    assert ended.exit_code == 0
    for expected in (*ids, "evaluate.bins", "15", "7", "Task Arithmetic", "L3", "(+0.0)"):
        assert expected in ended.output
    ended = bd_merge("compare", ids[0], "nothing", "--store", store.root, output=tmp_path / "output")
    assert ended.exit_code == 2 and "no record matches 'nothing'" in ended.output


def test_doctor_finds_a_flipped_byte_of_equal_size_and_the_next_run_a_missing_one(
    finished_copy: Finished, tmp_path: Path
) -> None:
    doctor = ["doctor", finished_copy.config, "--contents"]
    whole = bd_merge(*doctor, output=tmp_path / "output")
    assert whole.exit_code == 0, whole.output
    n_units = sum(1 for _ in finished_copy.store.units())
    assert f"ok   contents: {n_units} units match" in whole.output
    (shard,) = finished_copy.path.glob("shard/low-train-00000-*")
    tar = bytearray((shard / "images.tar").read_bytes())
    tar[2000] ^= 1
    (shard / "images.tar").write_bytes(tar)
    (head,) = finished_copy.path.glob("fit_head/head-*")
    manifest = json.loads((head / "manifest.json").read_text())
    (head / "manifest.json").write_text(json.dumps(manifest)[:-9])
    assert "contents" not in bd_merge("doctor", finished_copy.config, output=tmp_path / "output").output
    damaged = bd_merge(*doctor, output=tmp_path / "output")
    assert damaged.exit_code == 2
    assert f"FAIL contents: {shard}: images.tar has another sha256 than the manifest says" in damaged.output
    assert f"{head}: its manifest cannot be read" in damaged.output
