"""A job on a real cluster of two nodes gives the bytes of the local run: `infra/ray/submit.sh configs/cluster.yaml`."""

import subprocess
from pathlib import Path

import pytest
from e2e_store import contents
from finished import Finished
from ray_cluster import REPOSITORY, SCRIPTS, Cluster
from tiny import Tiny

from pipeline.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def submit(cluster: Cluster, store: Path, *arguments: object, token: str | None = None) -> tuple[int, str]:
    """Exit code and output of `infra/ray/submit.sh ARGUMENTS...`."""
    environment = cluster.environment | {"BD_STORE": str(store), "RAY_AUTH_TOKEN": token or cluster.token}
    done = subprocess.run(
        [SCRIPTS / "submit.sh", *map(str, arguments)],
        env=environment,
        cwd=store.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture
def config(tiny_project: Tiny) -> Path:
    """configs/cluster.yaml as it is, over the tiny project instead of the demo."""
    text = (REPOSITORY / "configs" / "cluster.yaml").read_text(encoding="utf-8")
    assert "extends: demo.yaml\n" in text
    path = tiny_project.root / "cluster.yaml"
    path.write_text(text.replace("extends: demo.yaml\n", f"extends: {tiny_project.write().name}\n"), encoding="utf-8")
    return path


def test_a_submitted_job_gives_the_bytes_of_the_local_run_on_both_nodes(
    ray_cluster: Cluster, config: Path, tmp_path: Path, finished_store: Finished
) -> None:
    store = tmp_path / "shared-store"
    code, output = submit(ray_cluster, store, config)
    assert code == 0, output
    assert "ray ready address=auto nodes=2 cpus=2" in output
    assert contents(Store(store)) == contents(finished_store.store)
    made_by = {manifest.made["pid"] for _, manifest in Store(store).units()}
    assert all(made_by & workers for workers in ray_cluster.workers()), "a node did nothing"


def test_a_job_that_fails_fails_the_submission(ray_cluster: Cluster, config: Path, tmp_path: Path) -> None:
    code, output = submit(ray_cluster, tmp_path / "store", config, "executor.adress=auto")
    assert code == 1 and "executor.adress: unknown key" in output
    assert not (tmp_path / "store").exists()


def test_a_wrong_token_and_a_relative_store_are_refused(ray_cluster: Cluster, config: Path, tmp_path: Path) -> None:
    code, output = submit(ray_cluster, tmp_path / "store", config, token="0" * 32)
    assert code != 0 and "token" in output.lower()
    code, output = submit(ray_cluster, Path("bd-store"), config)
    assert code == 2 and "absolute path" in output
