"""open_clip's rarer towers through the merged model: batched or through torch.func, equal to explicit merging."""

from __future__ import annotations

from typing import Any

import merged_cases as cases
import pytest
import torch

from bd_core.merged import MergedModel
from bd_core.task_vectors import layer_groups, task_vectors

CUSTOM = {"block_type": "custom", "layers": 1}
ATTENTION = "transformer.resblocks.0.attn (Attention): no batched form is known for a module that multiplies by in_proj"
TOWERS: dict[str, tuple[dict[str, Any], str | None]] = {
    "layer_scale": ({"ls_init_value": 0.5, "layers": 1}, None),
    "query_key_norm": ({**CUSTOM, "qk_norm": True}, ATTENTION),
    "scaled_heads": ({**CUSTOM, "scale_heads": True}, ATTENTION),
    "inner_norms": ({**CUSTOM, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}, ATTENTION),
    "attentional_pool": (
        {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2, "layers": 1},
        "the whole model: its batched form raises",
    ),
}


@pytest.mark.parametrize(("vision", "reason"), TOWERS.values(), ids=TOWERS)
def test_it_equals_explicit_merging_and_says_what_had_no_batched_form(
    vision: dict[str, Any], reason: str | None
) -> None:
    torch.manual_seed(0)
    model, images = cases.open_clip_tower(**vision)
    base, experts = cases.experts_of(model, 3)
    groups = layer_groups(base)
    merged = MergedModel(model, base, experts, groups)
    weights = torch.softmax(torch.randn(len(images), groups.n_groups, 3), -1)
    mine, theirs = weights.clone().requires_grad_(), weights.clone().requires_grad_()
    found = merged(images, weights=mine)
    wanted = cases.reference(model, base, task_vectors(base, experts), images, theirs, groups.index)
    assert cases.relative_error(found, wanted) <= 1e-5
    gradients = [torch.autograd.grad(y.square().sum(), w)[0] for y, w in ((found, mine), (wanted, theirs))]
    assert cases.relative_error(*gradients) <= 1e-5
    assert reason == merged.fallback_reason if reason is None else reason in (merged.fallback_reason or "")


def test_a_tower_that_cannot_run_by_itself_raises_its_own_error() -> None:
    """open_clip 3.3 calls torch.bmm with four dimensions in scaled cosine attention: its plain tower fails alike."""
    torch.manual_seed(0)
    model, images = cases.open_clip_tower(**CUSTOM, scaled_cosine_attn=True)
    with pytest.raises(RuntimeError, match="must be a 3D tensor") as plain:
        model(images)
    merged = MergedModel(model, *cases.experts_of(model, 2))
    with pytest.raises(RuntimeError) as ours:
        merged(images, weights=torch.full((len(images), 2), 0.5))
    assert str(ours.value) == str(plain.value)
