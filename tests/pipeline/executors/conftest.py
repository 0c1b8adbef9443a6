"""Executors on a store of the test's own: one in this process, one on a real Ray of two nodes."""

import os
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
def on_ray(ray_cluster: Cluster, tmp_path: Path) -> Iterator[RayExecutor]:
    """Joined for one test, so that each has workers of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", ray_cluster.token)
        executor = RayExecutor(RaySpec(address=ray_cluster.address), Store(tmp_path / "ray"), "run")
        try:
            yield executor
        finally:
            executor.close()
    assert not any(name.startswith("RAY_JOB") for name in os.environ)
