"""Merging tensor by tensor: what every file-level method reads, checks and gives back.

Legend: K experts, n entries of a flat chunk, `...` a parameter's own shape.

The state dicts may be lazy: reading `base[name]` may read a file. A tensor is read, used and let go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from bd_core.task_vectors import IncompatibleCheckpoints, all_finite, refuse_nonfinite, same_integers, widened

__all__ = [
    "BATCH_BYTES",
    "CHUNK",
    "EMBEDDINGS",
    "Altered",
    "Chunk",
    "Merged",
    "StateDict",
    "averaged",
    "chunks",
    "entrywise",
    "expert_vectors",
    "finish",
    "matrix_names",
    "merged_names",
    "same_shape",
    "unmerged",
]

StateDict = Mapping[str, Tensor]
Merged = Iterator[tuple[str, Tensor]]
Chunk = tuple[str, int, Tensor]

# Every operation on a chunk is a barrier between threads, which on a busy machine can take milliseconds: chunks are
# larger than a core's cache would have them (20 % slower when idle, several times faster when not).
CHUNK = 2**19  # entries of a tensor worked on at once, at most
CACHED = 2**22  # entries of a chunk's task vectors together, whatever K
BATCH_BYTES = 256 << 20  # task vectors of equal-shaped matrices taken together
# Two-dimensional parameters that multiply no activation: tables of embeddings.
EMBEDDINGS = (r"embedding", r"\bembed", r"\bwte\b", r"\bwpe\b", r"pos_embed", r"relative_position_bias_table")


def merged_names(base: StateDict) -> list[str]:
    """The tensors arithmetic applies to: floating point, finite, not empty; in the base's order.

    A base tensor with infinities is a constant such as a causal mask: `unmerged` gives it back if all experts agree.
    """
    return [name for name, tensor in base.items() if tensor.is_floating_point() and tensor.numel() and _finite(tensor)]


def unmerged(base: StateDict, experts: Sequence[StateDict]) -> Merged:
    """The tensors no arithmetic applies to, as the base has them.

    Raises IncompatibleCheckpoints where an expert has other values (BatchNorm's counters apart), and ValueError for
    NaN, or infinities that are not in every checkpoint.
    """
    kept = set(merged_names(base))
    for name, origin in base.items():
        if name in kept:
            continue
        for k, expert in enumerate(experts):
            if origin.is_floating_point():
                refuse_nonfinite(name, origin, origin, "the base")
                refuse_nonfinite(name, expert[name], origin, f"expert {k}")
            elif not same_integers(name, expert[name], origin):
                raise IncompatibleCheckpoints(
                    f"expert {k}: {name} ({origin.dtype}) has other values than the base; integer tensors cannot be "
                    "merged: give experts with equal ones"
                )
        yield name, origin.detach().clone()


def expert_vectors(base: StateDict, experts: Sequence[StateDict], name: str) -> Float[Tensor, "K ..."]:
    """tau_k = theta_k - theta_0 of one tensor in float32 (float64 stays), finite, or ValueError naming the expert."""
    origin = base[name]
    wide = widened(origin)
    vectors = wide.new_empty((len(experts), *origin.shape))
    for k, expert in enumerate(experts):
        vectors[k].copy_(expert[name].detach()).sub_(wide)
    if not _finite(vectors):
        _name_nonfinite(name, base, experts)
    return vectors


def finish(origin: Tensor, step: Tensor) -> Tensor:
    """origin + step, added in float32 (float64 stays) and cast to the base's dtype once."""
    return (widened(origin) + step).to(origin.dtype)


class Altered(Mapping[str, Tensor]):
    """An expert whose task vector `alter(entries [n], name, first, stride)` changes in place as `chunks` reads it.

    The entries are first, first + stride, ... of the flattened tensor. Reading by name gives the expert unchanged.
    """

    def __init__(self, expert: StateDict, alter: Callable[[Tensor, str, int, int], None]) -> None:
        self.expert, self.alter = expert, alter

    def __getitem__(self, name: str) -> Tensor:
        return self.expert[name]

    def __contains__(self, name: object) -> bool:
        return name in self.expert

    def __iter__(self) -> Iterator[str]:
        return iter(self.expert)

    def __len__(self) -> int:
        return len(self.expert)


def chunks(base: StateDict, experts: Sequence[StateDict], names: Sequence[str], stride: int = 1) -> Iterator[Chunk]:
    """(name, first entry, task vectors [K, n]) of every flattened tensor, at most CHUNK entries at a time.

    One buffer serves all chunks: a chunk is the reader's to change, and gone when the next one is asked for. With a
    `stride`, every stride-th entry of all tensors put end to end; a chunk's first entry then counts those.
    """
    buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    length = min(CHUNK, max(CACHED // len(experts), 2**12))
    passed = 0
    for name in names:
        flat_base = base[name].detach().reshape(-1)
        flat_experts = [expert[name].detach().reshape(-1) for expert in experts]
        first = 0
        if stride > 1:
            first, passed = -passed % stride, passed + len(flat_base)
            flat_base, *flat_experts = (flat[first::stride] for flat in (flat_base, *flat_experts))
        wide = torch.promote_types(flat_base.dtype, torch.float32)
        buffer = buffers.get((wide, flat_base.device))
        if buffer is None:
            buffer = torch.empty(len(experts) * length, dtype=wide, device=flat_base.device)
            buffers[wide, flat_base.device] = buffer
        for start in range(0, len(flat_base), length):
            origin = flat_base[start : start + length].to(wide)
            vectors_Kn = buffer[: len(experts) * len(origin)].view(len(experts), -1)
            for k, flat in enumerate(flat_experts):
                if flat.dtype == wide:
                    torch.sub(flat[start : start + length], origin, out=vectors_Kn[k])
                else:
                    vectors_Kn[k].copy_(flat[start : start + length]).sub_(origin)
            if not _finite(vectors_Kn):
                _name_nonfinite(name, base, experts)
            for expert, vector_n in zip(experts, vectors_Kn, strict=True):
                if isinstance(expert, Altered):
                    expert.alter(vector_n, name, first + start * stride, stride)
            yield name, start, vectors_Kn


def entrywise(
    base: StateDict,
    experts: Sequence[StateDict],
    names: Sequence[str],
    step: Callable[[Tensor, str, int], Tensor],
) -> Merged:
    """theta_0 + step of every tensor, where step([K, n] task vectors, name, first entry) gives [n] chunk by chunk.

    Beside in- and output: one chunk of K task vectors and what `step` makes of it.
    """
    result: Tensor | None = None
    for name, start, vectors_Kn in chunks(base, experts, names):
        origin = base[name]
        if start == 0:
            result = torch.empty(origin.numel(), dtype=origin.dtype, device=origin.device)
        assert result is not None
        end = start + vectors_Kn.shape[1]
        step_n = step(vectors_Kn, name, start)
        result[start:end] = origin.detach().reshape(-1)[start:end].to(step_n.dtype) + step_n
        if end == len(result):
            yield name, result.view(origin.shape)
            result = None


def averaged(base: StateDict, experts: Sequence[StateDict], names: Sequence[str]) -> Merged:
    """theta_0 + mean_k tau_k: what most matrix methods do with everything that is no matrix."""
    return entrywise(base, experts, names, lambda vectors_Kn, name, start: vectors_Kn.mean(0))


def matrix_names(base: StateDict, exclude: Sequence[str] = EMBEDDINGS) -> list[str]:
    """The two-dimensional tensors of `merged_names` whose name holds none of the patterns (regular expressions)."""
    left_out = [re.compile(pattern) for pattern in exclude]
    return [
        name
        for name in merged_names(base)
        if base[name].ndim == 2 and not any(pattern.search(name) for pattern in left_out)
    ]


def same_shape(
    base: StateDict, names: Sequence[str], n_experts: int, budget_bytes: int = BATCH_BYTES
) -> Iterator[list[str]]:
    """Batches of tensors of equal shape, dtype and device, as many as the budget holds K task vectors of."""
    # One tensor is always taken, however small the budget.
    alike: dict[tuple[torch.Size, torch.dtype, torch.device], list[str]] = {}
    for name in names:
        tensor = base[name]
        alike.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(name)
    for (shape, dtype, _), members in alike.items():
        each = n_experts * shape.numel() * torch.promote_types(dtype, torch.float32).itemsize
        size = max(1, budget_bytes // max(1, each))
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. A finite sum proves it in one pass; a sum may also overflow by itself."""
    total = tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or all_finite(tensor)


def _name_nonfinite(name: str, base: StateDict, experts: Sequence[StateDict]) -> None:
    origin = base[name]
    for k, expert in enumerate(experts):
        refuse_nonfinite(name, expert[name], origin, f"expert {k}")
    raise ValueError(f"{name}: a task vector is not finite though base and experts are; its values are too large")
