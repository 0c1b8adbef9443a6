"""Per-sample merging beside FusionBench's, in one process and at equal output.

Runs in an environment of its own, which is never one of the project's:

    python3.11 -m venv peers-fusionbench
    peers-fusionbench/bin/pip install torch==2.13.0 jaxtyping
    peers-fusionbench/bin/pip install fusion-bench==0.2.33
    peers-fusionbench/bin/python -m infra.bench.bench_fusionbench --save

One MLP block of a ViT-B/32 (768, 3072, 50 tokens), K = 8. FusionBench's `WeightEnsemblingMoE(batch_reduce=False)` loops
over the samples, adds up a state dict for each and calls the block on a batch of one; ours gets the weights of the same
gate. All forms run in turn; a ratio is taken within a round.
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
BATCHES = (1, 4, 16)
TARGET = 5.0
SCALE = 0.3


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
        "| batch | what | plain ms | FusionBench ms | ours ms | FusionBench / ours | quartiles | difference |",
        "|---" * 8 + "|",
    ]
    print("\n".join(lines), flush=True)
    for n_samples in BATCHES:
        for what in ("forward", "step"):
            lines.append(measure(n_samples, what, options.rounds))
            print(lines[-1], flush=True)
    lines += ["", f"Target: at least {TARGET:g} times faster at equal output."]
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

    forms: dict[str, Callable[[], Tensor]] = {"plain": lambda: base(x), "theirs": lambda: theirs(x), "ours": merged}
    with torch.no_grad():
        difference = float((forms["theirs"]() - merged()).abs().max() / merged().abs().max())
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            if what == "forward" or name == "plain":
                with torch.no_grad():
                    form()
            else:
                form().square().mean().backward()  # type: ignore[no-untyped-call]
            seconds[name].append(time.perf_counter() - start)
    kept = {name: found[1:] for name, found in seconds.items()}  # the first round warms up
    ratios = [a / b for a, b in zip(kept["theirs"], kept["ours"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    plain, fusion, own = (1e3 * statistics.median(kept[name]) for name in forms)
    return (
        f"| {n_samples} | {what} | {plain:.0f} | {fusion:.0f} | {own:.0f} | {middle:.1f} | {low:.1f}–{high:.1f} | "
        f"{difference:.0e} |"
    )


if __name__ == "__main__":
    main()
