"""How much memory a merge takes, worked out from headers before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bd_core.methods.stream import BATCH_BYTES, CHUNK
from pipeline.errors import BDMergeError, ConfigError
from pipeline.formats.lazy import LazyState
from pipeline.merge.assign import Plan
from pipeline.merge.spec import human

FLOAT = 4
# What all chunkwise methods together need beside chunks: samples of a threshold's selection, small tensors, masks.
SLACK_BYTES = 32 << 20
# Temporaries of K task vectors that a method makes of each: the sizes measured stay below.
COPIES = {"chunk": 4, "tensor": 4, "matrices": 5}


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
    found = [_of_group(plan.method.memory, group.names, states) for group in plan.groups]
    worst = max(found, key=lambda each: each.bytes)
    header = plan.header
    largest = max(value.numel() * value.element_size() for value in header.values())
    # One tensor being merged, at most two waiting for the disk, and slices of a file's own layout made of them.
    output = 4 * largest
    if plan.spec.output is not None and plan.spec.output.suffix in TORCH_SUFFIXES:
        output += sum(value.numel() * value.element_size() for value in header.values())
    return WorkingSet(worst.bytes + output + SLACK_BYTES, worst.tensor, worst.tensor_bytes)


TORCH_SUFFIXES = (".pt", ".pth", ".bin")


def _of_group(memory: str, names: Sequence[str], states: Sequence[LazyState]) -> WorkingSet:
    """Task vectors and temporaries of one group, with what reading it keeps in memory."""
    sizes = {name: states[0].sources[name].header.numel() * FLOAT for name in names}
    name = max(sizes, key=lambda each: sizes[each])
    largest, experts = sizes[name], len(states) - 1
    reading = sum(max(state.sources[each].scratch_bytes for each in names) for state in states)
    if memory == "chunk":
        held = COPIES["chunk"] * (experts + 1) * min(largest, CHUNK * FLOAT) + experts * sum(sizes.values()) // 50
    elif memory == "tensor":
        held = COPIES["tensor"] * (experts + 1) * largest
    elif memory == "matrices":
        held = COPIES["matrices"] * max((experts + 1) * largest, min(BATCH_BYTES, experts * sum(sizes.values())))
    else:
        held = (experts + 3) * sum(sizes.values())
    return WorkingSet(held + reading, name, largest)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short: Python's, torch's, or its allocator's RuntimeError."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and (
        "out of memory" in text or "can't allocate memory" in text or "cannot allocate memory" in text
    )
