"""The rates behind `bd_core/merged/cost.py`, in nanoseconds of the whole machine.

    python -m infra.bench.bench_costs

One matrix of a ViT-B/32 (3072 x 768), K = 8, 64 samples; median of rounds in which all forms run in turn. Forming and
multiplying are the intercept and the slope of the tiled form over the tokens, stacking the slope of the other; reading
is a sum over a quarter of a gigabyte, a call a matrix of 8 x 8.
"""

import statistics
import time
from collections.abc import Callable

import torch

from bd_core.huge_pages import empty
from bd_core.merged.exact import _stacked, _tiled
from bd_core.merged.kernel import kernel_name

N_SAMPLES, N_EXPERTS, N_OUTPUTS, N_INPUTS = 64, 8, 3072, 768
TOKENS = (1, 2, 4, 8, 16)
ROUNDS = 9


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    base = torch.randn(N_OUTPUTS, N_INPUTS)
    vectors = empty((N_EXPERTS, N_OUTPUTS, N_INPUTS), torch.float32).normal_()  # where `task_vectors` puts them
    weights = torch.softmax(torch.randn(N_SAMPLES, N_EXPERTS), -1)
    passes: dict[tuple[str, int], Callable[[], object]] = {}
    for n_tokens in TOKENS:
        x = torch.randn(N_SAMPLES, n_tokens, N_INPUTS)
        passes["tiles", n_tokens] = lambda x=x: _tiled(x, weights, base, vectors, None)
        passes["stacked", n_tokens] = lambda x=x: _stacked(x, weights, base, vectors, None, N_SAMPLES)
    seconds: dict[tuple[str, int], list[float]] = {each: [] for each in passes}
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            for each, run in passes.items():
                start = time.perf_counter()
                run()
                seconds[each].append(time.perf_counter() - start)
    # A sample's nanoseconds for an element; the first round warms up.
    scale = 1e9 / (N_SAMPLES * N_OUTPUTS * N_INPUTS)
    cost = {each: scale * statistics.median(found[1:]) for each, found in seconds.items()}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, kernel {kernel_name()}")
    print("| tokens | tiles ns | stacked ns |\n|---|---|---|")
    for n_tokens in TOKENS:
        print(f"| {n_tokens} | {cost['tiles', n_tokens]:.4f} | {cost['stacked', n_tokens]:.4f} |")
    few, many = TOKENS[1], TOKENS[-1]
    multiply = (cost["tiles", many] - cost["tiles", few]) / (many - few)
    form = (cost["tiles", few] - few * multiply) / N_EXPERTS
    stacked = (cost["stacked", many] - cost["stacked", few]) / (many - few) / (1 + N_EXPERTS)
    print(f"form={form:.4f}, multiply={multiply:.4f}, stacked={stacked:.4f}, read={read_ns():.4f},", end=" ")
    tiles_ns, stacked_ns = call_ns()
    print(f"call_tiles={tiles_ns:.0f}, call_stacked={stacked_ns:.0f}")


def read_ns() -> float:
    """A byte."""
    matrices = empty((1 << 26,), torch.float32).fill_(1)
    return min(_seconds(matrices.sum, 1) for _ in range(ROUNDS)) * 1e9 / (4 * matrices.numel())


def call_ns() -> tuple[float, float]:
    """A call of each form on next to nothing."""
    shapes = ((1, 1, 8), (1, N_EXPERTS), (8, 8), (N_EXPERTS, 8, 8))
    x, weights, base, vectors = (torch.randn(shape) for shape in shapes)
    with torch.no_grad():
        tiles = min(_seconds(lambda: _tiled(x, weights, base, vectors, None), 100) for _ in range(ROUNDS))
        stacked = min(_seconds(lambda: _stacked(x, weights, base, vectors, None, 1), 100) for _ in range(ROUNDS))
    return tiles * 1e9, stacked * 1e9


def _seconds(run: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


if __name__ == "__main__":
    main()
