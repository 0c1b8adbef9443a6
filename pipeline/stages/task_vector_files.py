"""Task vectors as files: whole or cut by SVD, in float32 or bfloat16, and what was lost by it.

`task_vectors.safetensors` holds whole tensors [K, ...] under their parameter's name; what is cut lies there as
`left/<name>` [K, O, R] and `right/<name>` [K, R, I]. Shape letters: K experts, O output rows, I input columns, R rank.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor

from bd_core.compression import CompressedVectors, svd_compress
from bd_core.task_vectors import TaskVectors
from pipeline import logs
from pipeline.config import Spec
from pipeline.formats.checkpoints import write_safetensors

VECTORS = "task_vectors.safetensors"
LEFT, RIGHT = "left/", "right/"
Precision = Literal["float32", "bfloat16"]


class DenseSpec(Spec):
    """Whole task vectors. bfloat16 halves their size and rounds every value to 8 bits."""

    kind: Literal["dense"] = "dense"
    dtype: Precision = "float32"


class LowRankSpec(Spec):
    """Matrices cut to their leading singular triplets; give exactly one of rank, rank_share and energy."""

    kind: Literal["low_rank"] = "low_rank"
    dtype: Precision = "float32"
    rank: int | None = Field(default=None, ge=1, description="triplets of every matrix")
    rank_share: float | None = Field(default=None, gt=0, le=1, description="share of a matrix's smaller side, as rank")
    energy: float | None = Field(default=None, gt=0, le=1, description="share of every expert's squared norm to keep")

    @model_validator(mode="after")
    def _one_criterion(self) -> Self:
        given = {name: value for name, value in self.criterion().items() if value is not None}
        if len(given) != 1:
            which = " and ".join(f"{name}={value}" for name, value in given.items()) or "none is given"
            raise ValueError(f"low_rank needs exactly one of rank, rank_share and energy ({which}); give one")
        return self

    def criterion(self) -> dict[str, Any]:
        """What `svd_compress` is told."""
        return {"rank": self.rank, "rank_share": self.rank_share, "energy": self.energy}


VectorsSpec = DenseSpec | LowRankSpec


def write_task_vectors(directory: Path, vectors: TaskVectors, spec: VectorsSpec) -> dict[str, Any]:
    """Write the vectors as `spec` says; what `recipe.json` keeps of it.

    Relative errors are those of what was written, rounding included, for each parameter that is not exact; mean and
    max go over these. Without any, nothing is kept for whole float32 vectors: they are what a recipe means by silence.
    """
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if isinstance(spec, DenseSpec):
        whole, cut = vectors.vectors, CompressedVectors({}, vectors.vectors, {}, {}, {})
    else:
        cut = svd_compress(vectors, **spec.criterion())
        whole = cut.dense
        if not cut.factors:
            logs.fact("export cuts nothing, every matrix is smaller whole", **_given(spec))
    stored = {name: stacked.to(dtype) for name, stacked in whole.items()}
    for name, (left_KOR, right_KRI) in cut.factors.items():
        stored |= {LEFT + name: left_KOR.to(dtype), RIGHT + name: right_KRI.to(dtype)}
    write_safetensors(directory / VECTORS, stored)
    if spec == DenseSpec():
        return {}
    error = {name: _relative_error(tau, _restored(stored, name, tau)) for name, tau in vectors.vectors.items()}
    inexact = [value for name, value in error.items() if name in cut.factors or spec.dtype != "float32"]
    return {
        "kind": spec.kind,
        "dtype": spec.dtype,
        **_given(spec),
        "shapes": {name: list(tau.shape[1:]) for name, tau in vectors.vectors.items()},
        "relative_error": error,
        "relative_error_mean": sum(inexact) / len(inexact) if inexact else 0.0,
        "relative_error_max": max(inexact, default=0.0),
        "bytes_per_expert": bytes_per_expert(directory, vectors.n_experts),
    }


def read_task_vectors(
    directory: Path, kept: Mapping[str, Any], base: Mapping[str, Tensor]
) -> TaskVectors | CompressedVectors:
    """The vectors in `directory`, widened to float32; `kept` is `vectors` of the recipe, empty for whole float32 ones.

    Vectors that were cut come back as their factors: nothing is expanded.
    """
    stored = {
        name: value.float() if value.dtype == torch.bfloat16 else value
        for name, value in load_file(directory / VECTORS).items()
    }
    if kept.get("kind", "dense") == "dense":
        # Buffers, and in a model that is merged in part, whatever has no vectors.
        return TaskVectors(stored, {name: value for name, value in base.items() if name not in stored})
    integers = {name: value for name, value in base.items() if not value.is_floating_point()}
    shapes = {name: tuple(shape) for name, shape in kept["shapes"].items()}
    factors = {name: (stored[LEFT + name], stored[RIGHT + name]) for name in shapes if name not in stored}
    dense = {name: stored[name] for name in shapes if name in stored}
    return CompressedVectors(factors, dense, integers, shapes, dict(kept["relative_error"]))


def held_dtype(kept: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype to hold whole task vectors in, MergedModel's `vectors_dtype`: as they are stored."""
    return torch.bfloat16 if kept.get("dtype") == "bfloat16" else None


def bytes_per_expert(directory: Path, n_experts: int) -> int:
    """Bytes on disk of the task vectors, by expert."""
    return (directory / VECTORS).stat().st_size // n_experts


def _given(spec: VectorsSpec) -> dict[str, Any]:
    """The criterion that was given, alone."""
    criterion = spec.criterion() if isinstance(spec, LowRankSpec) else {}
    return {name: value for name, value in criterion.items() if value is not None}


def _restored(stored: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    if name in stored:
        return stored[name].to(like)
    return torch.bmm(stored[LEFT + name].to(like), stored[RIGHT + name].to(like)).reshape(like.shape)


def _relative_error(tau: Tensor, restored: Tensor) -> float:
    """||tau - restored||_F / ||tau||_F over all K together, 0 for a zero vector: as `svd_compress` defines it."""
    norm = float(torch.linalg.vector_norm(tau))
    return float(torch.linalg.vector_norm(tau - restored)) / norm if norm else 0.0
