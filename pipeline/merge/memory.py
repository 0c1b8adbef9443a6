"""How much memory a merge takes, worked out from headers before anything is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bd_core.methods.matrices import LAYER_BYTES
from bd_core.methods.stream import CHUNK, EMBEDDINGS
from pipeline.errors import BDMergeError, ConfigError
from pipeline.formats.lazy import LazyState
from pipeline.merge.assign import Group, Plan
from pipeline.merge.spec import human

FLOAT = 4
SLACK_BYTES = 32 << 20  # small tensors, buffers of the readers and of the writer
# Copies that a method's steps make of what it holds, above all that were measured.
CHUNK_COPIES, TENSOR_COPIES, MATRIX_COPIES = 4, 4, 10
SELECTED = 1 << 19  # entries an expert is sampled by where a threshold is looked for, and of 1 % of all it is found in
SELECTION_COPIES = 4
_TABLE = re.compile("|".join(EMBEDDINGS))  # what matrix methods leave to the mean


class OutOfMemory(BDMergeError):
    """The machine had less memory than the merge took."""


@dataclass(frozen=True)
class WorkingSet:
    """The most a merge holds at once beside its inputs' file cache, and the tensor that decides it."""

    bytes: int
    tensor: str
    tensor_bytes: int

    def check(self, budget_bytes: int, method: str) -> None:
        """Raise ConfigError with the tensor and the budget that would do when it does not fit."""
        if self.bytes > budget_bytes:
            enough = -(-self.bytes // (1 << 20))
            raise ConfigError(
                f"{method} needs {human(self.bytes)} at {self.tensor} ({human(self.tensor_bytes)} as float32); "
                f"--memory-budget is {human(budget_bytes)}; set it to {enough}MiB, or --exclude the tensor"
            )


def working_set(plan: Plan) -> WorkingSet:
    """The working set of a plan: of its hungriest group, with the tensors on their way to the output."""
    inputs = plan.inputs
    states = [inputs.base_state, *(expert.state for expert in inputs.experts)]
    found = [_of_group(plan.method.memory, group, states) for group in plan.groups]
    worst = max(found, key=lambda each: each.bytes)
    header = plan.header
    largest = max(value.numel() * value.element_size() for value in header.values())
    # One tensor being merged, at most two waiting for the disk, and slices of a file's own layout made of them.
    output = 4 * largest
    if plan.spec.output is not None and plan.spec.output.suffix in TORCH_SUFFIXES:
        output += sum(value.numel() * value.element_size() for value in header.values())
    return WorkingSet(worst.bytes + output + SLACK_BYTES, worst.tensor, worst.tensor_bytes)


TORCH_SUFFIXES = (".pt", ".pth", ".bin")


def _of_group(memory: str, group: Group, states: Sequence[LazyState]) -> WorkingSet:
    """Task vectors and temporaries of one group, with what reading it keeps in memory."""
    names = group.names
    sizes = {name: states[0].sources[name].header.numel() * FLOAT for name in names}
    name = max(sizes, key=lambda each: sizes[each])
    largest, experts = sizes[name], len(states) - 1
    reading = sum(max(state.sources[each].scratch_bytes for each in names) for state in states)
    entries = sum(sizes.values())
    if memory == "chunk":
        held = CHUNK_COPIES * (experts + 1) * min(largest, CHUNK * FLOAT)
        if "keep" in group.parameters:  # a share of the entries: its threshold is looked for
            held += experts * (SELECTION_COPIES * min(entries, SELECTED * FLOAT) + entries // 50)
    elif memory == "tensor":
        held = TENSOR_COPIES * (experts + 1) * largest
    elif memory == "matrices":
        headers = {name: states[0].sources[name].header for name in names if not _TABLE.search(name)}
        matrices = [tuple(header.shape) for header in headers.values() if header.ndim == 2]
        held = MATRIX_COPIES * max((_batch_bytes(shape, matrices.count(shape)) for shape in set(matrices)), default=0)
    else:
        held = (experts + 3) * entries
    return WorkingSet(held + reading, name, largest)


def _batch_bytes(shape: tuple[int, ...], count: int) -> int:
    """Matrices of one shape that are taken together, with a square of their longer side for each."""
    each = shape[0] * shape[1] * FLOAT
    together = min(count, max(1, LAYER_BYTES // max(1, each)))
    return together * (each + max(shape) ** 2 * FLOAT)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short: Python's, torch's, or its allocator's RuntimeError."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and (
        "out of memory" in text or "can't allocate memory" in text or "cannot allocate memory" in text
    )
