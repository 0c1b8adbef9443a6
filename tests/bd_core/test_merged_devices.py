"""The merged model in mixed precision, and moved as a whole."""

from __future__ import annotations

import merged_cases as cases
import pytest
import torch
from torch import Tensor, nn

from bd_core.merged import MergedModel, exact
from bd_core.task_vectors import layer_groups


def first(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]  # type: ignore[index]


@pytest.mark.parametrize("case", [*cases.NATIVE, cases.odd], ids=lambda case: case.__name__)
def test_under_autocast_it_is_itself_up_to_rounding(case: cases.Case) -> None:
    torch.manual_seed(7)
    model, inputs = case()
    base, experts = cases.experts_of(model, 3)
    groups = layer_groups(base)
    weights = torch.softmax(torch.randn(len(inputs), groups.n_groups, 3), -1).requires_grad_()
    results = []
    for enabled in (True, False):
        merged = MergedModel(model, base, experts, groups)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = first(merged(inputs, weights=weights))
        results.append((y.float(), *torch.autograd.grad(y.float().square().sum(), weights)))
        assert case is cases.odd or merged.fallback_reason is None
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == torch.float32
        assert cases.relative_error(found, wanted) <= 4e-2


@pytest.mark.parametrize("n_tokens", [1, 9])
def test_autocast_decides_the_dtype_of_a_linear_map(n_tokens: int) -> None:
    torch.manual_seed(0)
    x, w, base, vectors, bias = (torch.randn(s) for s in [(3, n_tokens, 8), (3, 2), (5, 8), (2, 5, 8), (3, 5)])
    with torch.autocast("cpu", torch.bfloat16):
        y = exact.merged_linear(x.requires_grad_(), w.requires_grad_(), base, vectors, bias.bfloat16())
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.sum(), (x, w))
    assert [g.dtype for g in gradients] == [torch.float32] * 2
    wanted = exact.merged_linear(x, w, base, vectors, bias)
    assert cases.relative_error(y.float(), wanted) <= 2e-2


class Positions(nn.Module):
    """A module without a batched form, whose buffer is outside the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("positions", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x + self.positions


def test_moving_it_moves_buffers_outside_the_state_dict_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Positions())
    base, experts = cases.experts_of(model, 2)
    merged = MergedModel(model, base, experts).double()
    y = merged(torch.randn(3, 4, dtype=torch.float64), weights=torch.rand(3, 2))
    assert y.dtype == torch.float64
    merged.to("meta")
    for part in (merged.reference, merged.model[1]):
        assert {buffer.device.type for buffer in part._held[0].buffers()} == {"meta"}
