"""Task vectors from file to memory: held in the dtype they are stored in, and what an expert then takes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bd_core.merged import MergedModel
from bd_core.task_vectors import TaskVectors, task_vectors
from pipeline.stages.task_vector_files import (
    DenseSpec,
    LowRankSpec,
    VectorsSpec,
    held_dtype,
    read_task_vectors,
    write_task_vectors,
)


def model_and_vectors() -> tuple[nn.Module, dict[str, Tensor], TaskVectors]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).requires_grad_(False)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    experts = [{name: value + 0.1 * torch.randn_like(value) for name, value in base.items()} for _ in range(3)]
    return model, base, task_vectors(base, experts)


@pytest.mark.parametrize(
    ("spec", "dtype", "share"),
    [
        (DenseSpec(), torch.float32, 1.0),
        (DenseSpec(dtype="bfloat16"), torch.bfloat16, 0.5),
        (LowRankSpec(rank=4), torch.float32, 0.21),
    ],
    ids=["float32", "bfloat16", "low_rank"],
)
def test_they_are_held_as_they_are_stored(spec: VectorsSpec, dtype: torch.dtype, share: float, tmp_path: Path) -> None:
    model, base, vectors = model_and_vectors()
    kept = write_task_vectors(tmp_path, vectors, spec)
    read = read_task_vectors(tmp_path, kept, base)
    merged = MergedModel(model, base, read, vectors_dtype=held_dtype(kept))
    held = {b.dtype for name, b in merged.named_buffers() if not name.endswith("base") and b.ndim > 2}
    assert held in ({dtype}, set())  # factors are matrices, over all experts
    assert merged.bytes_per_expert == pytest.approx(share * vectors.size_bytes / 3, rel=0.05)
    x, weights = torch.randn(5, 7, 32), torch.softmax(torch.randn(5, 3), -1)
    exact = MergedModel(model, base, vectors)(x, weights=weights)
    tolerance = {DenseSpec(): 0.0, DenseSpec(dtype="bfloat16"): 1e-2}.get(spec, 1.0)
    assert float((merged(x, weights=weights) - exact).norm() / exact.norm()) <= tolerance
