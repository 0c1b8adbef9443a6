"""Per-sample merging beside FusionBench's, in one process and at equal output.

Runs in an environment of its own, which is never one of the project's:

    python3.11 -m venv peers-fusionbench
    peers-fusionbench/bin/pip install torch==2.13.0 jaxtyping
    peers-fusionbench/bin/pip install fusion-bench==0.2.33
    peers-fusionbench/bin/python -m infra.bench.bench_fusionbench --save

One MLP block of a ViT-B/32 (768, 3072, 50 tokens), K = 8. FusionBench's `WeightEnsemblingMoE(batch_reduce=False)` loops
over the samples, adds up a state dict for each and calls the block on a batch of one; ours gets the weights of the same
gate. It freezes base and experts itself, so its step forms no gradients to experts; both give them to the gate only.
All forms run in turn; a ratio is taken within a round.

The floor is what no implementation can avoid at equal output: every pass reads W_0 and the K task vectors once, at the
rate at which this machine sums as many bytes in the same round, or does the products at the rate of its own largest
one, whichever takes longer. "Both" is what a pass takes that does not read while it multiplies: asking for the next
block's lines during the products was measured and took as long, since the requests stall the products (two cores).
"""

import argparse
import copy
import logging
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bd_core.merged import MergedModel
from bd_core.merged.kernel import kernel_name

RESULTS = Path(__file__).parent / "results"
WIDTH, HIDDEN, TOKENS, EXPERTS = 768, 3072, 50, 8
LARGEST, LARGEST_ROUNDS = 128, 3  # there FusionBench takes seconds
BATCHES = (1, 4, 16, LARGEST)
TARGET = 5.0
SCALE = 0.3
MATRICES = 2 * WIDTH * HIDDEN  # elements of both layers' weights


class Block(nn.Module):
    """The MLP of a transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        y: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return y


def main() -> None:
    """Measure, print, and save where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write the table to infra/bench/results")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    lines = [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, kernel {kernel_name()}, fusion-bench 0.2.33",
        "",
        "| batch | what | plain ms | FusionBench ms | ours ms | FusionBench / ours | quartiles "
        "| reading ms | products ms | ours / longer | ours / both | FusionBench / both | difference |",
        "|---" * 13 + "|",
    ]
    print("\n".join(lines), flush=True)
    for n_samples in BATCHES:
        # FusionBench's step at 128 was ended for want of memory (24 GiB): its graph keeps a model for every sample.
        whats, rounds = (
            (("forward",), LARGEST_ROUNDS) if n_samples == LARGEST else (("forward", "step"), options.rounds)
        )
        for what in whats:
            lines.append(measure(n_samples, what, rounds))
            print(lines[-1], flush=True)
    lines += ["", f"Target: at least {TARGET:g} times faster at equal output.", *bottleneck()]
    if options.save:
        name = f"merged_fusionbench_{datetime.now(UTC):%Y%m%d}.md"
        command = f"python -m infra.bench.bench_fusionbench --rounds {options.rounds} --save"
        head = ["# Per-sample merging beside FusionBench", "", f"`{command}`", ""]
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / name).write_text("\n".join([*head, *lines, ""]), encoding="utf-8")


def measure(n_samples: int, what: str, rounds: int) -> str:
    """One row: the same block, gate and images through the plain block, FusionBench's loop and ours."""
    from fusion_bench.models.we_moe import WeightEnsemblingMoE  # type: ignore[import-not-found]

    torch.manual_seed(0)
    base = Block().requires_grad_(False)
    experts = [copy.deepcopy(base) for _ in range(EXPERTS)]
    for expert in experts:
        for parameter in expert.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    theirs: Any = WeightEnsemblingMoE(
        WIDTH,
        copy.deepcopy(base).requires_grad_(True),
        [copy.deepcopy(expert).requires_grad_(True) for expert in experts],
        init_lambda=SCALE,
        batch_first=True,
        batch_reduce=False,
    )
    for parameter in theirs.gate.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    ours = MergedModel(base, base.state_dict(), [expert.state_dict() for expert in experts], verify=False)
    x = torch.randn(n_samples, TOKENS, WIDTH)

    def merged() -> Tensor:
        features: Tensor = ours(x, weights=theirs.gate(x).mean(1))
        return features

    square = torch.randn(1024, 1024)
    forms: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: base(x),
        "theirs": lambda: theirs(x),
        "ours": merged,
        "read": torch.ones((EXPERTS + 1) * MATRICES).sum,
        "multiply": lambda: square @ square,
    }
    with torch.no_grad():
        difference = float((forms["theirs"]() - merged()).abs().max() / merged().abs().max())
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            if what == "forward" or name not in ("theirs", "ours"):
                with torch.no_grad():
                    form()
            else:
                form().square().mean().backward()  # type: ignore[no-untyped-call]
            seconds[name].append(time.perf_counter() - start)
    kept = {name: found[1:] for name, found in seconds.items()}  # the first round warms up
    ratios = [a / b for a, b in zip(kept["theirs"], kept["ours"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    plain, fusion, own, read, multiply = (1e3 * statistics.median(kept[name]) for name in forms)
    n_bytes, n_flops = least(n_samples, what)
    reading = read * n_bytes / (4 * (EXPERTS + 1) * MATRICES)
    products = multiply * n_flops / (2 * 1024**3)
    return (
        f"| {n_samples} | {what} | {plain:.0f} | {fusion:.0f} | {own:.0f} | {middle:.1f} | {low:.1f}–{high:.1f} | "
        f"{reading:.1f} | {products:.1f} | {own / max(reading, products):.1f} | {own / (reading + products):.1f} | "
        f"{fusion / (reading + products):.1f} | {difference:.0e} |"
    )


def least(n_samples: int, what: str) -> tuple[int, int]:
    """Bytes of matrices and FLOPs that a pass cannot avoid.

    Forward reads W_0 and the task vectors of both layers. Backward reads all of fc2's again, for the gradients to its
    input and to the weights, and fc1's task vectors: its input needs no gradient.
    """
    n_bytes, a_layer = 4 * (EXPERTS + 1) * MATRICES, 2 * n_samples * TOKENS * MATRICES // 2
    n_flops = 2 * a_layer + n_samples * 2 * EXPERTS * MATRICES
    if what == "forward":
        return n_bytes, n_flops
    merging = n_samples * 2 * EXPERTS * MATRICES
    return n_bytes + 4 * (EXPERTS + (EXPERTS + 1)) * MATRICES // 2, n_flops + 3 * a_layer + merging + merging // 2


def bottleneck() -> list[str]:
    """What bounds small batches here, measured alone: bytes, rate and time."""
    matrices = torch.ones((EXPERTS + 1) * MATRICES)
    seconds = []
    for _ in range(15):
        start = time.perf_counter()
        matrices.sum()
        seconds.append(time.perf_counter() - start)
    n_bytes, took = 4 * matrices.numel(), min(seconds)
    return [
        "",
        f"W_0 and {EXPERTS} task vectors of both layers are {n_bytes / 1e6:.0f} MB; this machine reads them at "
        f"{n_bytes / took / 1e9:.1f} GB/s at best, in {1e3 * took:.1f} ms. A forward pass must read them once, a step "
        f"{least(1, 'step')[0] / n_bytes:.2f} times. Where FusionBench / both is below {TARGET:g}, only a pass that "
        f"reads while it multiplies could meet the target on this machine with float32 task vectors.",
    ]


if __name__ == "__main__":
    main()
