"""A real Ray of two nodes on this machine, started and ended as a person would: with our scripts, and a token."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = REPOSITORY / "infra" / "ray"
START_S, STOP_S = 60.0, 30.0


@dataclass(frozen=True)
class Cluster:
    """Where the cluster is reached, and where its two nodes keep their logs."""

    address: str
    jobs: str
    token: str
    directories: tuple[Path, Path]

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to reach the cluster."""
        return node_environment() | {"RAY_AUTH_TOKEN": self.token, "RAY_API_SERVER_ADDRESS": self.jobs}

    def workers(self) -> list[set[int]]:
        """Process ids of all workers that each node ever had, from the names of their logs."""
        return [
            {int(log.stem.rpartition("-")[2]) for log in directory.glob("session_*/logs/worker-*.err")}
            for directory in self.directories
        ]


@contextmanager
def two_nodes() -> Iterator[Cluster]:
    """A head and a second node, one CPU each; both end with the block."""
    gcs, api, client, *others = free_ports(13)
    token, root = secrets.token_hex(16), Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))
    environment = node_environment() | {"RAY_AUTH_TOKEN": token, "BD_RAY_PORT": str(gcs), "BD_RAY_API_PORT": str(api)}
    cluster = Cluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{api}", token, (root / "a", root / "b"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        client_port = f"--ray-client-server-port={client}"
        stack.enter_context(_node(root / "a", others[:5], environment, "start_head.sh", client_port))
        wait_for_port(gcs)
        stack.enter_context(_node(root / "b", others[5:], environment, "start_worker.sh", cluster.address))
        # The agents answer last: the head's takes jobs, the other shows that its node has joined.
        for port in (api, others[2], others[7]):
            wait_for_port(port)
        yield cluster


def node_environment() -> dict[str, str]:
    """This process's environment with our commands on the path, and the tests' own stages for the workers."""
    paths = [REPOSITORY / name for name in ("tests", "tests/pipeline/executors")]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return inherited | {
        # Ray Train leaves a detached actor behind, for whose end a node would wait half a minute.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_worker_niceness": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }


@contextmanager
def _node(
    directory: Path, ports: list[int], environment: dict[str, str], script: str, *arguments: str
) -> Iterator[None]:
    names = ("node-manager", "object-manager", "dashboard-agent-listen", "runtime-env-agent", "metrics-export")
    flags = [f"--{name}-port={port}" for name, port in zip(names, ports, strict=True)]
    directory.mkdir()
    with (directory / "start.log").open("w") as log:
        process = subprocess.Popen(
            [SCRIPTS / script, *arguments, *flags, "--num-cpus=1", f"--temp-dir={directory}"],
            env=environment,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    except BaseException as error:
        error.add_note((directory / "start.log").read_text())
        raise
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def wait_for_port(port: int) -> None:
    """Return when something listens on `port`."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens on port {port} after {START_S:.0f} s")


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, outside the range in which Ray's workers choose theirs."""
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            if not 10002 <= port <= 19999:
                found.append(port)
    return found
