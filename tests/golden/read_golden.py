"""The golden tensors: a few small checkpoints and what two public peers make of them.

Legend: K experts, n samples, I input columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
State = dict[str, Tensor]
N_EXPERTS = 4
# A model in small: equal shapes, wide and high matrices, a kernel, biases, a norm's scale, a table, a scalar.
SHAPES: dict[str, tuple[int, ...]] = {
    "logit_scale": (),
    "embeddings.class_embedding": (10,),
    "embeddings.patch_embedding.weight": (10, 3, 2, 1),
    "embeddings.position_embedding.weight": (5, 10),
    "encoder.layers.0.self_attn.in_proj.weight": (30, 10),
    "encoder.layers.0.self_attn.in_proj.bias": (30,),
    "encoder.layers.0.self_attn.out_proj.weight": (10, 10),
    "encoder.layers.0.mlp.fc1.weight": (14, 10),
    "encoder.layers.0.mlp.fc1.bias": (14,),
    "encoder.layers.0.mlp.fc2.weight": (10, 14),
    "encoder.layers.0.mlp.fc2.bias": (10,),
    "encoder.layers.0.layer_norm1.weight": (10,),
    "encoder.layers.1.mlp.fc1.weight": (14, 10),
    "encoder.layers.1.mlp.fc2.weight": (10, 14),
    "head.weight": (7, 10),
}
# The parameters of the classifier that AdaMerging learns on: fc1, ReLU, fc2, head.
LEARNED = {
    "fc1.weight": "encoder.layers.0.mlp.fc1.weight",
    "fc1.bias": "encoder.layers.0.mlp.fc1.bias",
    "fc2.weight": "encoder.layers.0.mlp.fc2.weight",
    "fc2.bias": "encoder.layers.0.mlp.fc2.bias",
    "head.weight": "head.weight",
}
TASKS = ("one", "two", "three")  # those of AdaMerging
N_SEEN = 5  # each task looks at the first five of its classes, and classes are rolled by the task's place


@dataclass(frozen=True)
class Inputs:
    """What every case was made of: `masks` are DARE's, `activations[weight]` [K, n, I], `batches[task]` one a step."""

    base: State
    experts: list[State]
    masks: list[State]
    activations: State
    batches: State


@dataclass(frozen=True)
class Golden:
    """One case: what the peer made, and how it was called."""

    tensors: State
    facts: Mapping[str, Any]


def read_inputs() -> Inputs:
    """The inputs of all cases."""
    parts: dict[str, State] = {}
    for key, tensor in load_file(HERE / "inputs.safetensors").items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor

    def model(part: str) -> State:
        return {name: parts[part][name] for name in SHAPES}  # the file sorts its keys

    return Inputs(
        model("base"),
        [model(f"expert{k}") for k in range(N_EXPERTS)],
        [model(f"mask{k}") for k in range(N_EXPERTS)],
        parts["activations"],
        parts["batches"],
    )


def read_golden(case: str) -> Golden:
    """The case of this name in golden.json."""
    facts = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))[case]
    flat = load_file(HERE / facts["file"])[case]
    shapes = SHAPES if facts["tensors"] == "all" else facts["tensors"]
    tensors: State = {}
    start = 0
    for name, shape in shapes.items():
        size = 1
        for side in shape:
            size *= side
        tensors[name] = flat[start : start + size].view(*shape) if shape else flat[start]
        start += size
    assert start == len(flat), f"{case}: {len(flat)} numbers, {start} expected"
    return Golden(tensors, facts)
