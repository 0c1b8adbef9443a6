"""Compiles the GPU kernel for a Hopper GPU, which needs none; prints what each program takes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bd_core.merged import triton_kernel as kernel

OPERANDS = {"x_at", "y_at", "dy_at", "base_at", "vectors_at", "bias_at", "weights_at"}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def build(program: Any, blocks: kernel.Blocks, dtype: torch.dtype, contiguous: str, n_experts: int) -> Any:
    """The compiled program, for sizes and strides that 16 divides, as those of a tower are."""
    sizes = {"N_S": blocks.samples, "N_T": blocks.tokens, "N_O": blocks.outputs, "N_I": blocks.inputs}
    constants = {"HAS_BIAS": True, "BY_ROWS": contiguous == "i", "PRECISION": "ieee", **sizes}
    constants |= {"N_EXPERTS": n_experts, "N_K": max(16, n_experts)}
    constants |= dict.fromkeys(("x_i", "dy_o", "bias_o", f"base_{contiguous}", f"vectors_{contiguous}"), 1)
    signature = {}
    for name in program.arg_names:
        pointer = NAMES[dtype] if name in OPERANDS else "fp32"
        signature[name] = "constexpr" if name in constants else f"*{pointer}" if name.endswith("_at") else "i32"
    places = {name: (i,) for i, name in enumerate(program.arg_names)}
    source = ASTSource(
        program,
        signature,
        {places[name]: value for name, value in constants.items() if name in places},
        {place: [["tt.divisibility", 16]] for name, place in places.items() if name not in constants},
    )
    options = {"num_warps": blocks.warps, "num_stages": 2}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def stack_bytes(binary: bytes) -> int:
    """Bytes of a thread's stack: registers that did not fit."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "program.cubin"
        path.write_bytes(binary)
        usage = subprocess.run([TOOL, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]


def forward(n_tokens: int, dtype: torch.dtype, contiguous: str = "i", n_experts: int = 8) -> None:
    """`contiguous` is the side of the matrices whose elements lie together: "o" in the product for dx."""
    blocks = kernel._forward_blocks(n_tokens, max(16, n_experts), dtype)
    report(f"forward {dtype} {n_tokens} tokens", build(kernel._forward, blocks, dtype, contiguous, n_experts))


def backward(dtype: torch.dtype) -> None:
    blocks = kernel._weights_blocks(dtype)
    report(f"backward {dtype}", build(kernel._backward_weights, blocks, dtype, "i", 8))


def report(name: str, built: Any) -> None:
    sys.stdout.write(f"{name}: {stack_bytes(built.asm['cubin'])} {built.metadata.shared}\n")


if __name__ == "__main__":
    for n_tokens in (16, 50):
        forward(n_tokens, torch.bfloat16)
    forward(50, torch.bfloat16, contiguous="o")
    forward(50, torch.bfloat16, n_experts=64)
    forward(50, torch.float32)
    backward(torch.bfloat16)
    backward(torch.float32)
