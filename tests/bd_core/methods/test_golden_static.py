"""Entry-wise methods against golden tensors of FusionBench 0.2.33 and mergekit 0.1.5.

Relative to the step a merge takes from the base, not to the weights: at most 1e-5, or the docstring says what differs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden.read_golden import Inputs, State, read_golden, read_inputs
from golden_agreement import ROUNDING, assert_agrees, differences

from bd_core.methods import merge
from bd_core.methods.averages import task_arithmetic
from bd_core.methods.dare import dare
from bd_core.methods.model_stock import model_stock
from bd_core.methods.ties import ties


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return read_inputs()


@pytest.mark.parametrize(
    ("case", "method", "parameters"),
    [
        ("fb_weight_average", "weight_average", {}),
        ("mk_weight_average", "weight_average", {}),
        ("fb_task_arithmetic", "task_arithmetic", {}),
        ("mk_task_arithmetic", "task_arithmetic", {}),
        ("fb_ties_sum", "ties", {}),
        ("fb_ties_mean", "ties", {"merge": "mean"}),
        ("mk_ties_sum", "ties", {"trim": "per_tensor"}),
        ("mk_ties_mean", "ties", {"trim": "per_tensor", "merge": "mean"}),
    ],
)
def test_same_as_the_peer(inputs: Inputs, case: str, method: str, parameters: dict[str, Any]) -> None:
    """Ties follows FusionBench with a global trim, mergekit with one a tensor."""
    assert_agrees(merge(method, inputs.base, inputs.experts, **parameters), case, inputs.base)


def test_the_two_trims_differ(inputs: Inputs) -> None:
    """FusionBench trims the flattened model, mergekit every tensor: 0.9 of the direction is common here, no more."""
    steps = [
        torch.cat([(read_golden(case).tensors[name] - inputs.base[name]).flatten() for name in inputs.base])
        for case in ("fb_ties_sum", "mk_ties_sum")
    ]
    assert 0.85 < float(torch.cosine_similarity(steps[0], steps[1], dim=0)) < 0.995


@pytest.mark.parametrize("case", ["mk_weight_average_bf16", "mk_task_arithmetic_bf16"])
def test_half_precision_is_rounded_once(inputs: Inputs, case: str) -> None:
    """mergekit's average agrees to the bit. Its Task Arithmetic rounds every task vector and sum to bfloat16.

    Ours sums in float32 and rounds once, so it is never further from the exact sum than mergekit by more than the
    rounding of the result, and the two are within four roundings of the largest weight.
    """
    halved = [{name: tensor.bfloat16() for name, tensor in state.items()} for state in (inputs.base, *inputs.experts)]
    base, experts = halved[0], halved[1:]
    method = "weight_average" if "average" in case else "task_arithmetic"
    ours, peer = merge(method, base, experts), read_golden(case).tensors
    wide = [{name: tensor.double() for name, tensor in state.items()} for state in halved]
    exact = merge(method, wide[0], wide[1:])
    bits = float(torch.finfo(torch.bfloat16).eps)
    for name, tensor in ours.items():
        if method == "weight_average":
            assert torch.equal(tensor, peer[name]), name
        rounding = bits / 2 * float(exact[name].abs().max())
        assert float((tensor.double() - exact[name]).abs().max()) <= rounding, name
        assert float((tensor.double() - peer[name].double()).abs().max()) <= 4 * 2 * rounding, name


def with_masks(inputs: Inputs, drop: float) -> list[State]:
    """The experts after DARE with the stored masks, as both peers were given them."""
    return [
        {name: origin + mask[name] * (expert[name] - origin) / (1 - drop) for name, origin in inputs.base.items()}
        for expert, mask in zip(inputs.experts, inputs.masks, strict=True)
    ]


def test_dare_with_the_peers_masks(inputs: Inputs) -> None:
    """No two implementations draw the same masks, so both peers were handed ours: what follows the mask agrees.

    mergekit's default rescales to the old L1 norm; the paper's 1 / (1 - p) is its `rescale: false` with the weight
    divided by 1 - p. Its "dare_ties" elects signs without trimming (our Ties with `keep` 1), FusionBench's trims, too.
    """
    masked = with_masks(inputs, 0.5)
    for case in ("fb_dare", "mk_dare"):
        assert_agrees(dict(task_arithmetic(inputs.base, masked)), case, inputs.base)
    assert_agrees(dict(ties(inputs.base, masked)), "fb_dare_ties", inputs.base)
    assert_agrees(dict(ties(inputs.base, masked, keep=1.0, trim="per_tensor")), "mk_dare_sign", inputs.base)


def test_dare_drops_as_the_peers_do(inputs: Inputs) -> None:
    """Each entry of one expert's merge is the base's or the peers' rescaled one, in the promised proportion."""
    base, expert = inputs.base, inputs.experts[0]
    kept = dropped = 0
    for seed in range(8):
        for name, merged in dare(base, [expert], drop=0.5, scale=0.3, seed=seed):
            rescaled = base[name] + 0.3 * (expert[name] - base[name]) / 0.5
            near = 4 * ROUNDING * (merged.abs() + 1)
            is_kept, is_dropped = (merged - rescaled).abs() <= near, (merged - base[name]).abs() <= near
            assert bool((is_kept | is_dropped).all()), name
            kept, dropped = kept + int(is_kept.sum()), dropped + int((~is_kept).sum())
    assert abs(kept / (kept + dropped) - 0.5) < 0.03  # 5 standard errors of 8 * 1,147 draws


@pytest.mark.parametrize(
    ("case", "n_experts", "average"),
    [
        ("mk_model_stock", 4, "cosine"),
        ("mk_model_stock_two", 2, "cosine"),
        ("fb_model_stock", 4, "angle"),
        ("fb_model_stock_two", 2, "angle"),
    ],
)
def test_model_stock(inputs: Inputs, case: str, n_experts: int, average: Any) -> None:
    """For K > 2 mergekit averages the cosines and FusionBench the angles; each is a setting of ours.

    Both add something to the product of two norms (FusionBench 1e-8, mergekit at least 1e-6), ours nothing: a tensor
    whose task vectors have norms near 0.01 - here the scalar alone - differs by about 1e-8 / 1e-4 = 1e-4 of its step.
    """
    merged = dict(model_stock(inputs.base, inputs.experts[:n_experts], average=average))
    found = differences(merged, case, inputs.base)
    assert found.pop("logit_scale") <= 2e-4
    assert max(found.values()) <= 1e-5, max(found, key=lambda name: found[name])
