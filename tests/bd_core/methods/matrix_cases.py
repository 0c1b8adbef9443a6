"""Small checkpoints for the matrix methods, and how far two results are from each other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

State = dict[str, Tensor]
# Equal shapes (batched), high, wide, nearly square and square ones, and what is no matrix.
MATRICES = (
    "blocks.0.attn.weight",
    "blocks.0.mlp.weight",
    "blocks.1.attn.weight",
    "blocks.1.mlp.weight",
    "blocks.2.mlp",
)
SHAPES = dict(zip(MATRICES, ((12, 12), (24, 12), (12, 12), (12, 24), (13, 12)), strict=True))
SHAPES |= {"ln.weight": (12,), "ln.bias": (12,), "token_embedding.weight": (9, 12), "conv": (3, 2, 2, 2)}
REST = ("ln.weight", "ln.bias", "token_embedding.weight", "conv")


def states(n_experts: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[State, list[State]]:
    """A base and experts near it."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(scale: float) -> State:
        return {name: scale * torch.randn(shape, generator=generator).double() for name, shape in SHAPES.items()}

    base = drawn(1.0)
    experts = [{name: base[name] + noise for name, noise in drawn(0.1).items()} for _ in range(n_experts)]
    return as_dtype(base, dtype), [as_dtype(expert, dtype) for expert in experts]


def as_dtype(state: State, dtype: torch.dtype) -> State:
    return {name: tensor.to(dtype) for name, tensor in state.items()} | {"count": torch.tensor(3)}


def vectors(base: State, experts: list[State], name: str) -> list[Tensor]:
    """tau_k in float64."""
    return [expert[name].double() - base[name].double() for expert in experts]


def apart(merged: Tensor, base: Tensor, step: Tensor) -> float:
    """|merged - (base + step)| / |step|, less one rounding of the stored weights."""
    wanted = base.double() + step
    rounding = torch.finfo(merged.dtype).eps * float(wanted.norm())
    return max(0.0, float((merged.double() - wanted).norm()) - rounding) / float(step.norm())


def mean_steps(base: State, experts: list[State]) -> Iterator[tuple[str, Tensor]]:
    for name in REST:
        yield name, torch.stack(vectors(base, experts, name)).mean(0)
