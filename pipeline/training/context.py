"""What a fit needs of the world around it: where it stands among its workers, and where its state is kept."""

import io
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pipeline import logs


class TrainingContext(Protocol):
    """One or all of `world_size` workers that fit the same module on different slices of each batch."""

    world_size: int
    # Whose slices are computed here: one worker's in a job of several, everyone's in a single process.
    ranks: Sequence[int]

    def load(self) -> dict[str, Any] | None:
        """The state saved last, or None at the start."""
        ...

    def save(self, state: dict[str, Any], metrics: dict[str, float]) -> None:
        """Keep `state`, so that a killed fit goes on from here."""
        ...

    def average_gradients(self, module: nn.Module) -> None:
        """Replace every gradient, the sum over `ranks`, by its mean over all workers."""
        ...


class LocalContext:
    """A fit in this process, which does every worker's part in turn; its state is one file, replaced atomically."""

    def __init__(self, directory: Path, world_size: int = 1) -> None:
        self._path = directory / "state.pt"
        self.world_size = world_size
        self.ranks: Sequence[int] = range(world_size)

    def load(self) -> dict[str, Any] | None:
        """The state saved last, or None at the start."""
        return read_state(self._path)

    def save(self, state: dict[str, Any], metrics: dict[str, float]) -> None:
        """Keep `state`, so that a killed fit goes on from here."""
        write_state(self._path, state)

    def average_gradients(self, module: nn.Module) -> None:
        """Divide the gradients, which the workers' parts have added up in order."""
        if self.world_size > 1:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad /= self.world_size


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` beside `path`, flush it and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    buffer = io.BytesIO()  # torch's own file writer hides why a write failed, such as a full disk
    torch.save(state, buffer)
    with temporary.open("wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_state(path: Path) -> dict[str, Any] | None:
    """The state at `path`; None when there is none or it is damaged, which costs time and changes no result.

    Tensors and plain values only, no pickled object is executed.
    """
    if not path.is_file():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        logs.fact("a checkpoint of an unfinished fit is damaged, it begins again", level=30, path=path, error=error)
        return None
    assert isinstance(state, dict)
    return state
