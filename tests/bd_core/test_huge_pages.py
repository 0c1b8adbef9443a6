"""Large tensors in huge pages: the same tensors, in memory that the system was asked to back so."""

import mmap
from pathlib import Path

import pytest
import torch

from bd_core.huge_pages import LEAST_BYTES, empty
from bd_core.task_vectors import task_vectors

LARGE = (3, LEAST_BYTES // 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (0, 5), (3, 4), LARGE])
def test_a_tensor_is_as_torch_would_make_it(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = empty(shape, dtype)
    assert (made.shape, made.dtype) == (torch.Size(shape), dtype)
    assert made.is_contiguous() and not made.requires_grad
    assert torch.equal(made.fill_(2).double(), torch.full(shape, 2.0, dtype=torch.float64))


def test_memory_outlives_the_name_it_was_made_under() -> None:
    row = empty(LARGE, torch.float32).fill_(3)[1]
    assert float(row.sum()) == 3 * row.numel()


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this kernel has no transparent huge pages",
)
def test_large_task_vectors_ask_for_huge_pages() -> None:
    base = {"weight": torch.zeros(LARGE[1])}
    vectors = task_vectors(base, [{"weight": torch.full((LARGE[1],), float(k))} for k in range(2)]).vectors["weight"]
    assert torch.equal(vectors[:, 0], torch.arange(2.0))
    assert "hg" in flags_at(vectors.data_ptr() + LEAST_BYTES)


def flags_at(address: int) -> list[str]:
    """What the kernel holds of the mapping around an address (VmFlags of /proc/self/smaps)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace").splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(end, 16) for end in first.split("-"))
            inside = start <= address < stop
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")
