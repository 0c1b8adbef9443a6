"""Commits: whole or not at all, whoever races, whenever the process dies."""

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from processes import CONTEXT
from unit_makers import FILES, commit_for_ever, commit_unit, key_of, write_files

from pipeline.errors import DataError
from pipeline.store import Manifest, Store, sha256_file

KILLS = 25


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_unit_has_its_files_and_a_manifest_that_describes_them(store: Store) -> None:
    artefact = commit_unit(store)
    assert artefact.path == store.root / "made" / f"unit-{artefact.key[:12]}"
    manifest = json.loads((artefact.path / "manifest.json").read_text())
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        name: len(content) for name, content in FILES.items()
    }
    for name, content in FILES.items():
        assert artefact.file(name).read_bytes() == content
        assert manifest["files"][name]["sha256"] == sha256_file(artefact.file(name))
    assert (manifest["stage"], manifest["unit"], manifest["key"]) == ("made", "unit", artefact.key)
    assert manifest["made"]["pid"] == os.getpid()
    found = store.find("made", "unit", artefact.key)
    assert found == artefact
    assert [path for path, _ in store.units()] == [artefact.path]


def test_the_digest_is_of_the_files_alone(store: Store) -> None:
    def late(directory: Path) -> dict[str, Any]:
        return {**write_files(directory), "metrics": {"took": 1.0}}

    one, other = commit_unit(store, "one"), commit_unit(store, "other", late)
    assert one.key != other.key and one.made != other.made and one.report != other.report
    assert one.digest == other.digest

    def with_more(directory: Path) -> dict[str, Any]:
        (directory / "more").write_bytes(b"")
        return write_files(directory)

    assert commit_unit(store, "third", with_more).digest != one.digest


@pytest.mark.parametrize("error", [DataError("bad rows"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_unit_that_fails_leaves_nothing(store: Store, error: BaseException) -> None:
    def fail(directory: Path) -> dict[str, Any]:
        write_files(directory)
        raise error

    with pytest.raises(type(error)):
        commit_unit(store, produce=fail)
    assert list((store.root / "made").iterdir()) == []
    assert list(store.units()) == []


def test_of_two_committers_one_wins_and_the_other_gets_its_unit(store: Store) -> None:
    both = threading.Barrier(2)
    made: list[Any] = []

    def race(directory: Path) -> dict[str, Any]:
        both.wait(10)
        return write_files(directory)

    threads = [threading.Thread(target=lambda: made.append(commit_unit(store, produce=race))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[0] == made[1]
    assert [path.name for path in (store.root / "made").iterdir()] == [made[0].path.name]


def test_a_late_committer_does_not_overwrite(store: Store) -> None:
    first = commit_unit(store)
    before = (first.path / "manifest.json").stat()

    def other(directory: Path) -> dict[str, Any]:
        (directory / "table.bin").write_bytes(b"other bytes")
        return {}

    assert commit_unit(store, produce=other) == first
    assert (first.path / "manifest.json").stat().st_mtime_ns == before.st_mtime_ns
    assert len(list((store.root / "made").iterdir())) == 1


def test_training_state_goes_when_its_unit_is_committed(store: Store) -> None:
    state = store.state_directory("made", "unit", key_of("unit"))

    def fit(directory: Path) -> dict[str, Any]:
        assert store.state_beside(directory) == state
        state.mkdir()
        (state / "state.pt").write_bytes(b"half way")
        return write_files(directory)

    commit_unit(store, produce=fit)
    assert not state.exists()


def test_damage_is_found_by_size_at_once_and_by_content_when_asked(store: Store) -> None:
    artefact = commit_unit(store)
    manifest, table = Manifest.read(artefact.path), artefact.file("table.bin")
    content = table.read_bytes()
    table.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert manifest.damage(artefact.path) is None
    assert "another sha256" in (manifest.damage(artefact.path, contents=True) or "")
    table.write_bytes(content[:-1])
    assert manifest.damage(artefact.path) == "table.bin has 9999 bytes, the manifest says 10000"
    assert store.find("made", "unit", artefact.key) is None
    table.unlink()
    assert manifest.damage(artefact.path) == "table.bin is missing"


@pytest.mark.parametrize(
    "text", ["", '{"schema": 1, "stage"', "[]", "null", '{"schema": 99}', '{"schema": 1}', "\x00\xff"]
)
def test_a_torn_manifest_is_no_unit(store: Store, text: str) -> None:
    artefact = commit_unit(store)
    (artefact.path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"manifest\.json"):
        Manifest.read(artefact.path)
    assert store.find("made", "unit", artefact.key) is None
    assert list(store.units()) == []
    assert store.unreadable() == [artefact.path]


def test_what_is_set_aside_is_no_unit_and_is_swept(store: Store) -> None:
    artefact = commit_unit(store)
    moved = store.set_aside(artefact.path)
    assert moved.is_dir() and list(store.units()) == [] and store.passing() == [moved]
    again = commit_unit(store)
    assert again.digest == artefact.digest
    assert store.sweep() == 1 and not moved.exists() and again.path.is_dir()


def test_a_process_killed_at_any_moment_never_leaves_half_a_unit(store: Store) -> None:
    commit_unit(store, "u00000")
    seen = 0
    for kill in range(KILLS):
        process = CONTEXT.Process(target=commit_for_ever, args=(store.root,))
        process.start()
        before = sum(1 for _ in store.units())
        while sum(1 for _ in (store.root / "made").glob("u*")) <= before:
            time.sleep(0.0005)
        time.sleep(0.0007 * kill)  # somewhere within a later commit
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        process.close()
        visible = [path for path in (store.root / "made").iterdir() if not path.name.startswith(".")]
        units = list(store.units())
        assert [path for path, _ in units] == sorted(visible)
        assert [fault for path, manifest in units[seen:] if (fault := manifest.damage(path, contents=True))] == []
        seen = len(units)
    assert store.passing(), "no kill hit a commit; the moments are chosen badly"
    store.sweep()
    assert store.passing() == []
