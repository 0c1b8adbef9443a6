"""Small real checkpoints to merge."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.merge.run import Done, merge_files
from pipeline.merge.spec import MergeSpec

State = dict[str, Tensor]


def make_state(seed: int = 0, base: State | None = None, dtype: torch.dtype = torch.float32) -> State:
    """A small model of any architecture; with `base`, a copy of it fine-tuned by noise."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layers.0.weight": (12, 8), "layers.1.weight": (12, 8), "layers.1.bias": (12,), "table": (20, 6)}
    if base is None:
        made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        return made | {"steps": torch.tensor(3), "mask": torch.tensor([True, False, True])}
    tuned = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
    return {name: tuned[name].to(value.dtype) if value.is_floating_point() else value for name, value in base.items()}


class Models:
    """A folder with a base, experts a, b, c, and what the tests do with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = make_state()
        self.experts = [make_state(seed, self.base) for seed in (1, 2, 3)]
        self.save("base", self.base)
        for name, state in zip("abc", self.experts, strict=True):
            self.save(name, state)

    def path(self, name: str) -> Path:
        """Where a model lies."""
        return self.folder / f"{name}.safetensors"

    def save(self, name: str, state: State) -> Path:
        """Write a model; its path."""
        save_file({key: value.contiguous().clone() for key, value in state.items()}, self.path(name))
        return self.path(name)


def run(models: Models, *names: str, method: str = "task_arithmetic", force: bool = False, **settings: Any) -> Done:
    """Merge a, b and c (or `names`) into out.safetensors; `settings` replace what a `MergeSpec` has."""
    given = {"base": models.path("base"), "experts": [models.path(name) for name in names or "abc"]}
    given |= {"method": method, "output": models.folder / "out.safetensors"} | settings
    return merge_files(MergeSpec.model_validate(given), force=force)


def out(models: Models) -> dict[str, Tensor]:
    """What was merged."""
    return load_file(models.folder / "out.safetensors")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and, to rounding, values."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, equal_nan=True)
