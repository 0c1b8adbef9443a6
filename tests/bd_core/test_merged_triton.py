"""The GPU kernel of exact merging: in Triton's interpreter, on a GPU where there is one, and compiled for one.

Each runs in a process of its own: Triton is told of its interpreter before it is imported, and the shape checks of the
test run would stand between it and the source of its programs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bd_core.merged.gpu import SHARED_BYTES, triton_fits

pytest.importorskip("triton", reason="Triton is not installed: exact merging runs through torch")

HERE = Path(__file__).parent
CASES = re.findall(r"^def (\w+)\(\) -> None:$", (HERE / "triton_cases.py").read_text(), re.MULTILINE)
CASES.remove("interpret")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def run(script: str, *arguments: str, **environment: str) -> list[str]:
    """Lines that a script of this folder prints."""
    done = subprocess.run(
        [sys.executable, HERE / script, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parents[1]))), **environment},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def interpreted() -> list[str]:
    return run("triton_cases.py", "cpu", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def on_gpu() -> list[str]:
    return run("triton_cases.py", "cuda", TRITON_INTERPRET="0")


@pytest.mark.parametrize("case", CASES)
def test_interpreted_it_is_the_definition(case: str, interpreted: list[str]) -> None:
    assert [line for line in interpreted if line.split()[0] == case] == [case]


@needs_gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_it_is_the_definition(case: str, on_gpu: list[str]) -> None:
    assert [line for line in on_gpu if line.split()[0] == case] == [case]


def test_it_compiles_for_a_hopper_gpu_into_registers_and_shared_memory(tmp_path: Path) -> None:
    lines = run("triton_builds.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(lines) == 7
    for line in lines:
        spilled_bytes, shared_bytes = map(int, line.rpartition(":")[2].split())
        assert spilled_bytes <= 16 and shared_bytes <= SHARED_BYTES, line


def test_what_is_on_the_cpu_goes_elsewhere() -> None:
    assert not triton_fits(torch.ones(1, 3, 2), torch.ones(4, 2), torch.ones(5, 4, 2))
