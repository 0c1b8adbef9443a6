"""Executors on a store of the test's own: one in this process, one on a real Ray of two nodes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_cluster import Cluster

from pipeline.executors import RayExecutor, RaySpec, SerialExecutor
from pipeline.store import Store


@pytest.fixture
def events(tmp_path: Path) -> Path:
    path = tmp_path / "events"
    path.mkdir()
    return path


@pytest.fixture
def serial(tmp_path: Path) -> SerialExecutor:
    return SerialExecutor(Store(tmp_path / "serial"), "run")


@pytest.fixture
def joined(ray_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> RaySpec:
    """The cluster, and the token for it in this process's environment."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", ray_cluster.token)
    return RaySpec(address=ray_cluster.address)


@pytest.fixture
def on_ray(joined: RaySpec, tmp_path: Path) -> Iterator[RayExecutor]:
    """Joined for one test, so that each has workers of its own."""
    executor = RayExecutor(joined, Store(tmp_path / "ray"), "run")
    yield executor
    executor.close()
