"""What the merged model keeps for backward: no more than the plain model, since activations are made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from merged_cases import experts_of, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bd_core.compression import svd_compress
from bd_core.merged import MergedModel
from bd_core.merged.origin import origin_of
from bd_core.task_vectors import task_vectors

N_SAMPLES, TOKENS, WIDTH = 4, 64, 16


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A residual MLP of a transformer, its activation and dropout as timm has them."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.fc1, self.act = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), act
        self.drop, self.fc2 = nn.Dropout(0.5), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.drop(self.act(self.fc1(self.norm(x)))))


def kept_bytes(output: Tensor, own: set[int]) -> int:
    """Bytes of all storages that the graph of `output` holds, but for the model's own."""
    nodes, seen, sizes = [output.grad_fn], set(), {}
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [next_node for next_node, _ in node.next_functions]
        found = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        found += getattr(node, "saved_tensors", ())
        for tensor in found:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in own:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.buffers(), *model.parameters())}


def blocks(act: nn.Module) -> tuple[nn.Module, MergedModel, MergedModel]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(act) for _ in range(3))).eval().requires_grad_(False)
    base, experts = experts_of(model, 2)
    cut = svd_compress(task_vectors(base, experts), rank=1)
    exact, low_rank = (MergedModel(model, base, vectors, verify=False) for vectors in (experts, cut))
    return model, exact, low_rank


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.ReLU(), QuickGELU()], ids=str)
def test_a_step_keeps_little_more_than_the_plain_step(act: nn.Module) -> None:
    model, exact, low_rank = blocks(act)
    x = torch.randn(N_SAMPLES, TOKENS, WIDTH, requires_grad=True)
    weights = torch.rand(N_SAMPLES, 2, requires_grad=True)
    plain = kept_bytes(model(x), storages(model))
    for merged in (exact, low_rank):
        # Beyond the plain step: every sample's own scales and shifts, which do not grow with the tokens.
        assert kept_bytes(merged(x, weights=weights), storages(merged)) <= 1.15 * plain


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "quick_gelu": QuickGELU(),
    "dropped": lambda x: F.dropout(F.gelu(x), 0.5, training=False),
    "viewed": lambda x: F.gelu(x).view(2, -1, 2),
}


@pytest.mark.parametrize("function", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_an_activation_is_made_again_bitwise(function: Callable[[Tensor], Tensor]) -> None:
    before = torch.randn(2, 3, 4, requires_grad=True) * 1.0
    x = function(before)
    origin = origin_of(x)
    assert origin is not None and all(not source.requires_grad for source in origin.sources)
    assert torch.equal(origin.again(*origin.sources), x)


def test_what_cannot_be_made_again_or_is_kept_anyway_has_no_origin() -> None:
    leaf = torch.randn(2, 3, requires_grad=True)
    before = leaf * 2.0
    written = F.gelu(before)
    with torch.no_grad():
        written.mul_(2)
    half = F.gelu(before).bfloat16()
    for x in (leaf, before, torch.relu(before), written, half, F.gelu(torch.randn(2))):
        assert origin_of(x) is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert origin_of(F.gelu(before)) is None, "checkpointing and offloading keep what they keep"


@pytest.mark.parametrize("which", [1, 2], ids=["exact", "low_rank"])
def test_gradients_are_those_of_checkpointing_and_of_a_second_backward(which: int) -> None:
    merged = blocks(nn.GELU())[which]
    x, weights = torch.randn(N_SAMPLES, TOKENS, WIDTH), torch.rand(N_SAMPLES, 2, requires_grad=True)
    y = merged(x, weights=weights).square().sum()
    (first,) = torch.autograd.grad(y, weights, retain_graph=True)
    (second,) = torch.autograd.grad(y, weights)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, weights)
    again = checkpoint(lambda w: merged(x, weights=w), weights, use_reentrant=False)
    assert relative_error(torch.autograd.grad(again.square().sum(), weights)[0], first) <= 1e-6


def test_a_source_that_was_written_to_is_noticed() -> None:
    merged = blocks(nn.GELU())[1]
    first, second = merged.model[0].fc1, merged.model[0].fc2
    weights = torch.rand(N_SAMPLES, 2, requires_grad=True)
    merged.routing.begin(weights[:, None])
    before = first(torch.randn(N_SAMPLES, TOKENS, WIDTH))
    y = second(F.gelu(before))
    merged.routing.end()
    with torch.no_grad():
        before.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
