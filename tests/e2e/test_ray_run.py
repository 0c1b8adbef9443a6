"""The whole flow on a Ray of our own: the bytes of the serial run, a quiet terminal, and nothing left behind."""

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from e2e_store import contents
from finished import Finished
from tiny import Tiny

from pipeline.executors.ray_session import SCRATCH, SCRATCH_PARENT
from pipeline.run import run
from pipeline.store import Manifest, Store
from pipeline.workflow import Workflow

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ON_RAY = {"kind": "ray", "cpus": 2}
DEADLINE_S = 500.0


class Watched:
    """`bd-merge run` in a session of its own, every process of which can be found by a mark in its environment."""

    def __init__(self, *arguments: object, output: Path) -> None:
        self.mark, self._output = secrets.token_hex(8), output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", "run", *map(str, arguments)],
                env=environment() | {"BD_TEST_MARK": self.mark},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def until(self, true: Callable[[], bool]) -> None:
        """Wait until `true()`; fail when the command ends before."""
        began = time.monotonic()
        while not true():
            assert self.process.poll() is None, self.output
            assert time.monotonic() - began < DEADLINE_S, self.output
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        """As a terminal does it: to the whole process group."""
        os.killpg(self.process.pid, number)

    def end(self) -> int:
        return self.process.wait(DEADLINE_S)

    def alive(self) -> list[str]:
        """Command lines of what it started and what still runs."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (path / "environ").read_bytes():
                    found.append((path / "cmdline").read_text())
            except OSError:
                continue
        return found

    def scratch(self) -> list[Path]:
        return list(SCRATCH_PARENT.glob(f"{SCRATCH}{self.process.pid}-*"))


def environment() -> Mapping[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[..., Watched]]:
    """Start commands; whatever a failing test leaves of them is killed."""
    started: list[Watched] = []

    def start(*arguments: object) -> Watched:
        started.append(Watched(*arguments, output=tmp_path / f"output-{len(started)}"))
        return started[-1]

    yield start
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()


def gone(command: Watched) -> bool:
    """Whether all its processes end within a few seconds."""
    deadline = time.monotonic() + 20
    while command.alive() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not command.alive()


def test_a_local_ray_gives_the_bytes_of_the_serial_run_quietly_and_leaves_nothing(
    tiny_project: Tiny, finished_store: Finished, watch: Callable[..., Watched]
) -> None:
    command = watch(tiny_project.write(executor=ON_RAY))
    assert command.end() == 0, command.output
    made = Store(tiny_project.root / "store")
    assert contents(made) == contents(finished_store.store)
    assert command.alive() == [] and command.scratch() == []
    assert [path.name for path in made.root.glob(".ray_train/*")] == []
    progress = command.output.partition("accuracy, task-known")[0]
    ours = r"\d\d:\d\d:\d\d INFO (ray ready|(radius|edges) planned|\w+ +(runs|done)) "
    assert [line for line in progress.splitlines() if not re.match(ours, line)] == []


def test_a_killed_fit_goes_on_from_rays_checkpoint_and_ctrl_c_leaves_nothing(
    finished_copy: Finished, tmp_path: Path, watch: Callable[..., Watched]
) -> None:
    fit_head = {"steps": 3000, "batch_size": 16, "checkpoint_every": 50}
    config = finished_copy.tiny.write(executor=ON_RAY, fit_head=fit_head)
    jobs = finished_copy.path / ".ray_train"

    def noted() -> bool:
        snapshots = jobs.glob("fit_head-head-*/checkpoint_manager_snapshot.json")
        return any("checkpoint_dir_name" in path.read_text() for path in snapshots)

    killed = watch(config)
    killed.until(noted)
    killed.signal(signal.SIGKILL)
    killed.end()
    assert gone(killed)
    # Ray's checkpoint gets a mark of its own, which only a fit that goes on from it can hand down.
    checkpoints = list(jobs.glob("fit_head-head-*/checkpoint_*/state.pt"))
    assert checkpoints
    for path in checkpoints:
        state = torch.load(path, weights_only=True)
        assert 50 <= len(state["history"]) < 3000
        state["history"][0]["loss"] = 12345.0
        torch.save(state, path)

    resumed = watch(config)
    resumed.until(lambda: len(heads(finished_copy.store)) == 2)
    assert killed.scratch() == [], "the directory of a killed local Ray is swept by the next"
    resumed.signal(signal.SIGINT)
    assert resumed.end() == 130
    assert "interrupted" in resumed.output and "Traceback" not in resumed.output
    assert gone(resumed) and resumed.scratch() == []

    serial = Workflow.load(finished_copy.tiny.write("serial.yaml", fit_head=fit_head, store=str(tmp_path / "serial")))
    serial.stages = serial.stages[: [stage.name for stage in serial.stages].index("fit_head") + 1]
    run(serial, "")
    (by_ray,) = (path for path, m in heads(finished_copy.store) if m.spec["steps"] == 3000)
    ((undisturbed, manifest),) = heads(Store(tmp_path / "serial"))
    assert by_ray.name == undisturbed.name and manifest.spec["steps"] == 3000
    assert (by_ray / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    losses = [pq.read_table(path / "history.parquet")["loss"].to_pylist() for path in (by_ray, undisturbed)]
    assert losses[0][0] == 12345.0 and losses[0][1:] == losses[1][1:]


def heads(store: Store) -> list[tuple[Path, Manifest]]:
    return [(path, manifest) for path, manifest in store.units() if manifest.stage == "fit_head"]


def test_a_request_that_no_ray_can_meet_ends_with_2_before_any_unit(
    tiny_project: Tiny, watch: Callable[..., Watched]
) -> None:
    command = watch(tiny_project.write(executor=ON_RAY), "fit_router.workers=3")
    assert command.end() == 2
    assert "resources.fit_router.cpus: 1 for each of 3 workers, the local Ray has 2" in command.output
    assert list(Store(tiny_project.root / "store").units()) == []
    assert gone(command) and command.scratch() == []
