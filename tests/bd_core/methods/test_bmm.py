"""Bayesian Model Merging against its formula, at its limits, and prepared for a search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrix_cases import MATRICES, REST, apart, states, vectors
from test_matrix_methods import grams

from bd_core.methods.averages import task_arithmetic
from bd_core.methods.bmm import ANCHORS, bmm, module_groups, prepare_bmm
from bd_core.methods.regmean import regmean

DOUBLE = {name: gram.double() for name, gram in grams(3).items()}


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_bmm_is_its_formula(anchor: str, calibrated: bool) -> None:
    base, experts = states(3)
    anchored = dict(ANCHORS[anchor](base, experts))
    settings: dict[str, Any] = {"grams": DOUBLE if calibrated else None, "anchor": anchor}
    found = dict(bmm(base, experts, **settings, log10_lambda=-2.0, scale=0.7))
    for name in MATRICES:
        taus = vectors(base, experts, name)
        total, pull = torch.zeros_like(DOUBLE[name][0]), torch.zeros_like(base[name])
        for k, tau in enumerate(taus):
            gram = DOUBLE[name][k] if calibrated else tau.T @ tau / tau.square().sum()
            total += gram
            pull += (base[name] + tau - anchored[name]) @ gram
        star = anchored[name] + pull @ torch.linalg.inv(total + 0.01 * torch.eye(len(total)).double())
        assert apart(found[name], base[name], 0.7 * (star - base[name])) <= 1e-8, name
    assert all(torch.equal(found[name], anchored[name]) for name in REST)


def test_the_limits_are_regmean_and_the_anchor() -> None:
    base, experts = states(3)
    prepared = prepare_bmm(base, experts, grams=DOUBLE)
    limits = dict(regmean(base, experts, grams=DOUBLE, diagonal_share=0.0)), dict(task_arithmetic(base, experts))
    for log10_lambda, wanted in zip((-12.0, 12.0), limits, strict=True):
        once, again = dict(bmm(base, experts, grams=DOUBLE, log10_lambda=log10_lambda)), prepared.merge(log10_lambda)
        for name in MATRICES:
            assert apart(once[name], base[name], wanted[name] - base[name]) <= 1e-7
            assert apart(again[name], base[name], wanted[name] - base[name]) <= 1e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_prepared_is_the_same_merge_again_and_again(dtype: torch.dtype) -> None:
    base, experts = states(3, dtype=dtype)
    prepared = prepare_bmm(base, experts, anchor="tsv_m")
    for log10_lambda, scale in ((-3.0, 1.0), (0.5, 0.3), (-3.0, 1.0)):
        again = prepared.merge(log10_lambda, scale)
        assert list(again) == list(base)
        for name, tensor in bmm(base, experts, anchor="tsv_m", log10_lambda=log10_lambda, scale=scale):
            assert tensor.dtype == again[name].dtype
            assert torch.allclose(again[name].double(), tensor.double(), rtol=0.01 if dtype == torch.bfloat16 else 1e-5)


def test_groups_are_kind_and_depth() -> None:
    names = [f"visual.blocks.{i}.{part}.weight" for i in range(6) for part in ("attn.out_proj", "mlp.c_fc")]
    groups = module_groups([*names, "text.blocks.0.self_attention.q", "text.blocks.2.dense.weight", "visual.proj"])
    assert groups["visual.blocks.1.attn.out_proj.weight"] == groups["visual.blocks.0.attn.out_proj.weight"]
    assert groups["visual.blocks.2.mlp.c_fc.weight"] == "mlp middle" and groups["visual.proj"] == "other"
    assert groups["visual.blocks.5.attn.out_proj.weight"] == "attention late"
    assert groups["text.blocks.0.self_attention.q"] == "attention early"  # its row has three blocks
    assert groups["text.blocks.2.dense.weight"] == "mlp late"


def test_settings_a_group_and_wrong_ones() -> None:
    base, experts = states(3)
    prepared = prepare_bmm(base, experts)
    plain = prepared.merge()
    moved = prepared.merge({"attention early": 2.0}, {"attention early": 0.5})
    changed = {name for name in base if not torch.equal(plain[name], moved[name])}
    assert changed == {"blocks.0.attn.weight"} and prepared.groups["blocks.0.attn.weight"] == "attention early"
    streamed = dict(bmm(base, experts, log10_lambda={"attention early": 2.0}, scale={"attention early": 0.5}))
    assert all(torch.allclose(streamed[name].double(), moved[name].double(), atol=1e-9) for name in base)
    for call, text in (
        (lambda: prepared.merge({"nose": 1.0}), "log10_lambda has no group 'nose'; it is one of attention early"),
        (lambda: dict(bmm(base, experts, scale={"nose": 1.0})), "scale has no group 'nose'"),
        (lambda: bmm(base, experts, scale=float("nan")), "scale=nan must be finite"),
        (lambda: bmm(base, experts, anchor="mine"), "anchor='mine' must be one of task_arithmetic, wudi_exact"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_results_are_new_tensors() -> None:
    base, experts = states(2)
    prepared = prepare_bmm(base, experts)
    before = prepared.merge()
    for tensor in prepared.merge().values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.merge().items())
