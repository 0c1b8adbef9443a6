"""A tiny real project for each test that wants one, and one finished serial run of it for the whole session.

`tiny_project`    (function): a `Tiny` of the test's own below `tmp_path`; nothing has run, `write()` gives its YAML.
`finished_store`  (session): a `Finished`, the store of one finished serial run; read it, never change it.
`finished_copy`   (function): a `Finished` of the test's own, project and store copied with their times of change, so
                  that every unit of the store is found again.
`ray_cluster`     (session): a `Cluster`, a real Ray of two nodes with one CPU each.

The pipeline is imported by the fixtures, so that tests of `bd_core` alone do without it.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from finished import Finished, copied
from ray_cluster import Cluster, two_nodes
from tiny import Tiny, make_tiny


def pytest_configure() -> None:
    """Where a shell began the tests in its background, Ctrl-C is ignored, and so it would be by what they start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before xdist takes note of the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under `-n`: a file's tests stay together for their fixtures' sake, and no two Rays run at once.

    Ray's group takes longest, so it begins first.
    """
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


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
