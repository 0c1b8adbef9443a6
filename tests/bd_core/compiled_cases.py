"""Compiles merged models with `fullgraph=True`, compares them with their eager selves, prints each case that holds."""

from __future__ import annotations

import sys

import merged_cases as cases
import torch

from bd_core.compression import svd_compress
from bd_core.merged import MergedModel
from bd_core.task_vectors import layer_groups, task_vectors


def check(case: cases.Case) -> None:
    torch.manual_seed(7)
    model, inputs = case()
    base, experts = cases.experts_of(model, 3)
    vectors, groups = task_vectors(base, experts), layer_groups(base)
    weights = torch.softmax(torch.randn(len(inputs), groups.n_groups, 3), -1)
    for own in (vectors, svd_compress(vectors, rank=2)):
        merged = MergedModel(model, base, own, groups, verify=False)
        outputs = []
        for forward in (merged, torch.compile(merged, backend="aot_eager", fullgraph=True)):
            w = weights.clone().requires_grad_()
            y = forward(inputs, weights=w)
            outputs.append((y, *torch.autograd.grad(y.square().sum(), w)))
        for found, wanted in zip(*outputs, strict=True):
            assert cases.relative_error(found, wanted) <= 1e-5


# One block each: tracing takes a second a block.
CASES: dict[str, cases.Case] = {
    "mlp": cases.mlp,
    "open_clip_vit": lambda: cases.open_clip_tower(layers=1),
    "timm_vit": lambda: cases.timm_vit(depth=1),
}

if __name__ == "__main__":
    for name, case in CASES.items():
        check(case)
        sys.stdout.write(f"{name}\n")
