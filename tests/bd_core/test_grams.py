"""Gram matrices seen from outside, against forward passes written out by hand.

Legend: B samples, T tokens, W width, H heads.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bd_core.grams import InputMoments

B, T, W, H = 3, 5, 8, 2


class Block(nn.Module):
    """A pre-norm attention block whose projections are plain parameters, and a projection used as x W."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(W)
        self.attention = nn.MultiheadAttention(W, H, batch_first=True)
        self.widen = nn.Linear(W, 2 * W)
        self.unused = nn.Linear(W, W)
        self.proj = nn.Parameter(torch.randn(2 * W, W))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return F.gelu(self.widen(x)) @ self.proj


def by_hand(block: Block, x_BTW: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums over single tokens in float64, and of the squares at the norm's scale."""
    grams: dict[str, Tensor] = {}
    square = torch.zeros(W, dtype=torch.float64)

    def count(name: str, row: Tensor) -> None:
        wide = row.double()
        grams[name] = grams.get(name, torch.zeros(len(row), len(row), dtype=torch.float64)) + torch.outer(wide, wide)

    weights = block.attention
    for sample in x_BTW:
        normalised = []
        for token in sample:
            centred = token - token.mean()
            normalised.append(centred / math.sqrt(float(centred.square().mean()) + block.norm.eps))
            square += normalised[-1].double().square()
        y_TW = torch.stack([block.norm.weight * each + block.norm.bias for each in normalised])
        for token in y_TW:
            count("attention.in_proj_weight", token)
        q, k, v = (y_TW @ weights.in_proj_weight.T + weights.in_proj_bias).chunk(3, dim=-1)
        heads = []
        for h in range(H):
            own = slice(h * W // H, (h + 1) * W // H)
            heads.append((q[:, own] @ k[:, own].T / math.sqrt(W // H)).softmax(-1) @ v[:, own])
        mixed_TW = torch.cat(heads, dim=-1)
        after_TW = sample + mixed_TW @ weights.out_proj.weight.T + weights.out_proj.bias
        for token, later in zip(mixed_TW, after_TW, strict=True):
            count("attention.out_proj.weight", token)
            count("widen.weight", later)
    rows = B * T
    return {name: total / rows for name, total in grams.items()}, {"norm.weight": square / rows}


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gram_matrices_are_those_of_the_written_out_forward_pass(guard: type) -> None:
    torch.manual_seed(0)
    block, x_BTW = Block().eval(), torch.randn(B, T, W)
    nn.init.normal_(block.norm.weight)
    with torch.no_grad():
        grams, squares = by_hand(block, x_BTW)
    moments = InputMoments(dict(block.named_parameters()))
    with guard(), moments:
        for part in torch.split(x_BTW, 2):  # in unequal batches
            block(part)
    assert set(moments.grams) == set(grams), "x W and what is never used are left out"
    assert set(moments.squares) == set(squares)
    for name, expected in {**grams, **squares}.items():
        found = {**moments.grams, **moments.squares}[name]
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_models_output_and_the_fast_path_stay_as_they_were() -> None:
    torch.manual_seed(0)
    block, x_BTW = Block().eval(), torch.randn(B, T, W)
    with torch.no_grad():
        expected = block(x_BTW)
        with InputMoments(dict(block.named_parameters())):
            seen = block(x_BTW)
    torch.testing.assert_close(seen, expected)
    assert torch.backends.mha.get_fastpath_enabled()


def test_parameters_that_share_memory_are_refused() -> None:
    weight = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"a and b share their memory"):
        InputMoments({"a": weight[:2], "b": weight[2:]})
