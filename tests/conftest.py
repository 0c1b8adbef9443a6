"""A tiny real project for each test that wants one, and one finished serial run of it for the whole session.

`tiny_project`    (function): a `Tiny` of the test's own below `tmp_path`; nothing has run, `write()` gives its YAML.
`finished_store`  (session): a `Finished`, the store of one finished serial run; read it, never change it.
`finished_copy`   (function): a `Finished` of the test's own, project and store copied with their times of change, so
                  that every unit of the store is found again.
`ray_cluster`     (session): a `Cluster`, a real Ray of two nodes with one CPU each.

The pipeline is imported by the fixtures, so that tests of `bd_core` alone do without it.
"""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from finished import Finished, copied
from ray_cluster import Cluster, two_nodes
from tiny import Tiny, make_tiny
from xdist.scheduler import LoadFileScheduling

RAY = re.compile(r"/test_(ray|cluster)\w*\.py$")


def pytest_configure() -> None:
    """Where a shell began the tests in its background, Ctrl-C is ignored, and so it would be by what they start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class FilesAndOneRay(LoadFileScheduling):  # type: ignore[misc]
    """A file's tests stay on one worker for their fixtures' sake, and so do all that start a Ray."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "ray" if RAY.search(path) else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> FilesAndOneRay:
    # Not by marks: xdist 3.8 writes groups into names that pytest 9.2 does not read again.
    return FilesAndOneRay(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray's tests take longest, so they begin first."""
    items.sort(key=lambda item: not RAY.search(item.nodeid.partition("::")[0]))


@pytest.fixture(scope="session")
def tiny_original(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny_project(tiny_original: Tiny, tmp_path: Path) -> Tiny:
    return copied(tiny_original, tmp_path / "project")


@pytest.fixture(scope="session")
def finished_store(tiny_original: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    from pipeline.run import run
    from pipeline.workflow import Workflow

    tiny = copied(tiny_original, tmp_path_factory.mktemp("finished") / "project")
    config = tiny.write()
    record = run(Workflow.load(config), f"bd-merge run {config}")
    return Finished(tiny, config, tiny.root / "store", record.run_id)


@pytest.fixture
def finished_copy(finished_store: Finished, tmp_path: Path) -> Finished:
    tiny = copied(finished_store.tiny, tmp_path / "project")
    return Finished(tiny, tiny.write(), tiny.root / "store", finished_store.run_id)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Cluster]:
    with two_nodes() as cluster:
        yield cluster
