"""The GPU kernel of edge distances: in Triton's interpreter, and on a GPU where there is one.

Each runs in a process of its own: Triton is told of its interpreter before it is imported, and the shape checks of the
test run would stand between it and the source of its program.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bd_core.edge_distance import triton_runs

pytest.importorskip("triton", reason="Triton is not installed: on a GPU edge distances run through torch")

HERE = Path(__file__).parent


def run(device: str, interpret: str) -> str:
    """What the cases print."""
    done = subprocess.run(
        [sys.executable, HERE / "edge_triton_cases.py", device],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_interpreted_it_is_torch() -> None:
    assert run("cpu", "1") == "equal\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_it_is_torch() -> None:
    assert run("cuda", "0") == "equal\n"


def test_what_is_on_the_cpu_goes_elsewhere() -> None:
    assert not triton_runs(torch.ones(3, 2), torch.ones(4, 2))
