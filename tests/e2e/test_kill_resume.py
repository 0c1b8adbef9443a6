"""A run may die at any moment: what it finished is kept, nothing half-written counts, the same command goes on."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from finished import Finished
from processes import DEADLINE_S, Command, bd_merge
from tiny import Tiny

from pipeline.store import Store
from pipeline.workflow import STAGES

ORDER = [stage.name for stage in STAGES]
FITS = ("fit_head", "fit_router")
MIB = 2**20
TRIES, MISSED_AT_MOST = 6, 3


def digests(store: Store) -> dict[str, str]:
    """{stage/unit: digest} of every unit but the report, which shows when and where its run took place."""
    return {f"{m.stage}/{m.unit}": m.digest for _, m in store.units() if m.stage != "report"}


def assert_only_whole_units(store: Store) -> None:
    assert store.unreadable() == []
    for path, manifest in store.units():
        assert manifest.damage(path, contents=True) is None
    visible = [path for stage in ORDER for path in (store.root / stage).glob("[!.]*")]
    assert sorted(visible) == sorted(path for path, _ in store.units())


def assert_as_if_undisturbed(store: Store, undisturbed: Finished) -> None:
    assert_only_whole_units(store)
    assert digests(store) == digests(undisturbed.store)
    assert {m.unit for _, m in store.units() if m.stage == "report"} == {"report"}
    assert store.passing() == [] and list(store.root.glob("*/.state-*")) == []


def stop_when(command: Command, seen: Callable[[], object], number: signal.Signals) -> bool:
    """Send `number` once `seen()`; False when the command ended before that."""
    deadline = time.monotonic() + DEADLINE_S
    while not seen():
        if not command.running:
            return False
        assert time.monotonic() < deadline, "what the test waits for does not happen"
    command.signal(number)
    return True


def begun(store: Store, stage: str) -> Callable[[], bool]:
    """Whether a unit of `stage` is being written or there; for a fit, whether its first checkpoint is there."""
    directory = store.root / stage

    def found() -> bool:
        try:
            with os.scandir(directory) as entries:
                names = [entry.name for entry in entries]
        except FileNotFoundError:
            return False
        if stage in FITS:
            return any((directory / name / "state.pt").exists() or not name.startswith(".") for name in names)
        return bool(names)

    return found


def there(store: Store, unit: str) -> Callable[[], bool]:
    """Whether `stage/unit` is committed."""
    return lambda: any(store.root.glob(f"{unit}-*"))


def killed_at_work(config: Path, store: Store, stage: str, output: Path) -> bool:
    """Run and kill when `stage` has begun; whether the kill came while one of its units was being written."""
    command = Command("run", config, output=output)
    assert stop_when(command, begun(store, stage), signal.SIGKILL), command.end().output
    assert command.end().exit_code == -signal.SIGKILL
    return any((store.root / stage).glob(".tmp-*"))


@pytest.mark.timeout(900)  # forty seconds on an idle machine
def test_killed_in_every_stage_a_run_ends_with_the_bytes_of_an_undisturbed_one(
    tiny_project: Tiny, finished_store: Finished, tmp_path: Path
) -> None:
    store, config = Store(tiny_project.root / "store"), tiny_project.write()
    missed = []
    order = [stage for stage in ORDER if (finished_store.path / stage).exists()]  # the others have nothing to do here
    for place, stage in enumerate(order):
        for attempt in range(TRIES):
            if killed_at_work(config, store, stage, tmp_path / "output"):
                break
            # A stage of three milliseconds may be over before the signal arrives: as if it had never begun, and again.
            if attempt + 1 < TRIES:
                for name in order[place:]:
                    shutil.rmtree(store.root / name, ignore_errors=True)
        else:
            missed.append(stage)  # it died just after this stage instead
        assert_only_whole_units(store)
    assert len(missed) <= MISSED_AT_MOST, missed
    ended = bd_merge("run", config, output=tmp_path / "output")
    assert ended.exit_code == 0, ended.output
    assert "swept what an interrupted run left" in ended.output
    assert_as_if_undisturbed(store, finished_store)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_politely_a_run_leaves_nothing_half_done_and_says_how_to_go_on(
    tiny_project: Tiny, tmp_path: Path, number: signal.Signals
) -> None:
    # One fit of some seconds, so that the signal meets it half way.
    fit = {**tiny_project.config["fit_router"], "variants": ["task"], "steps": 30}
    store, config = Store(tiny_project.root / "store"), tiny_project.write(fit_router=fit)
    command = Command("run", config, output=tmp_path / "output")
    assert stop_when(command, begun(store, "fit_router"), number)
    ended = command.end()
    assert ended.exit_code == 130
    assert ended.output.endswith(
        "bd-merge: interrupted; finished units are kept, the same command goes on from there\n"
    )
    assert "Traceback" not in ended.output
    assert store.passing() == []
    assert_only_whole_units(store)
    kept = digests(store)
    assert "pairs/low-train-00000" in kept and "fit_router/task" not in kept
    assert list(store.root.glob("fit_router/.state-*/state.pt"))

    again = Command("run", config, output=tmp_path / "output")
    assert stop_when(again, there(store, "fit_router/task"), number)
    again.end()
    assert digests(store).items() > kept.items()
    done = [line.split()[2] for line in (tmp_path / "output").read_text().splitlines() if " done " in line]
    assert done[:1] in ([], ["fit_router"])


def test_a_full_disk_is_named_and_the_same_command_goes_on_when_there_is_room(
    tiny_project: Tiny, finished_store: Finished, tmp_path: Path
) -> None:
    store, config = Store(tiny_project.root / "store"), tiny_project.write()
    # No file over 1 MiB can be written, and the base has three.
    ended = bd_merge("run", config, output=tmp_path / "output", file_size_limit=MIB)
    assert ended.exit_code == 1
    for fact in ("base: 1 of 1 units failed", "File too large", "make room in", "resume with:", f"run {config}"):
        assert fact in ended.output, ended.output
    assert "Traceback" not in ended.output
    assert_only_whole_units(store)
    assert store.passing() == [] and {m.stage for _, m in store.units()} == {"shard"}
    ended = bd_merge("run", config, output=tmp_path / "output")
    assert ended.exit_code == 0, ended.output
    assert_as_if_undisturbed(store, finished_store)


@pytest.mark.parametrize("size_kib", [100, 4200, 5400])
def test_a_store_on_a_full_disk_has_only_whole_units(tiny_project: Tiny, tmp_path: Path, size_kib: int) -> None:
    root = tiny_project.root / "store"
    config = tiny_project.write()
    with small_disk(root, size_kib):
        ended = bd_merge("run", config, output=tmp_path / "output")
        assert ended.exit_code == 1, ended.output
        assert "No space left on device" in ended.output
        assert "Traceback" not in ended.output.split("bd-merge: ")[-1]
        store = Store(root)
        assert_only_whole_units(store)
        assert store.passing() == []
        kept = digests(store)
        subprocess.run(["mount", "-o", "remount,size=64m", root], check=True)
        command = Command("run", config, output=tmp_path / "output")
        stop_when(command, there(store, "fit_head/head"), signal.SIGTERM)
        command.end()
        assert {**kept, "fit_head/head": digests(store)["fit_head/head"]}.items() <= digests(store).items()


@contextmanager
def small_disk(root: Path, size_kib: int) -> Iterator[None]:
    root.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", root], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", root], check=True)
