"""Price of the per-sample merged model: time and memory against a plain forward pass of the same model.

    python -m infra.bench.bench_merged --quick            # the demo's tower and a ViT-B/32, small batch
    python -m infra.bench.bench_merged --full --save      # every CPU row, written to infra/bench/results

All forms of one row run interleaved in one process; a ratio is taken within a round, and the median over rounds is
printed with its quartiles. The floor is arithmetic: the FLOPs a form cannot avoid over those of the plain pass.
Random weights: time does not depend on their values. Legend: K experts, T tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from ctypes import CDLL
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pipeline.backbones.torchvision_ops  # noqa: F401  before open_clip
from bd_core.compression import CompressedVectors
from bd_core.merged import MergedModel
from bd_core.merged.kernel import kernel_name
from bd_core.task_vectors import TaskVectors, layer_groups

RESULTS = Path(__file__).parent / "results"
DEMO = {"image_size": 32, "patch_size": 8, "width": 96, "layers": 4, "head_width": 32, "mlp_ratio": 4.0}
TARGETS = {
    ("forward", "exact"): 1.6,
    ("forward", "low rank 16"): 1.35,
    ("forward", "low rank 96"): 2.4,  # the width over K: for memory, not for speed
    ("forward", "grouped 4"): 1.15,
    ("step", "exact"): 2.5,
    ("step", "low rank 16"): 1.6,
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a tower, a batch, what is timed, and which forms of it."""

    tower: str
    batch: int
    what: str  # "forward" | "step"
    forms: tuple[str, ...]
    n_experts: int
    rounds: int


QUICK = (
    Row("demo", 64, "forward", ("exact",), 4, 15),
    Row("demo", 144, "step", ("exact",), 4, 15),
    Row("ViT-B-32", 16, "forward", ("exact", "low rank 16"), 8, 7),
    Row("ViT-B-32", 16, "step", ("exact", "low rank 16"), 8, 5),
)
FULL = (
    Row("demo", 64, "forward", ("exact", "low rank 16", "grouped 4"), 4, 25),
    Row("demo", 144, "forward", ("exact", "low rank 16", "grouped 4"), 4, 25),
    Row("demo", 64, "step", ("exact", "low rank 16"), 4, 25),
    Row("demo", 144, "step", ("exact", "low rank 16"), 4, 25),
    Row("ViT-B-32", 16, "forward", ("exact", "low rank 16", "low rank 96", "grouped 4"), 8, 9),
    Row("ViT-B-32", 128, "forward", ("exact", "low rank 16", "grouped 4"), 8, 7),
    Row("ViT-B-32", 16, "step", ("exact", "low rank 16"), 8, 7),
    Row("ViT-B-32", 128, "step", ("exact", "low rank 16"), 8, 3),
)
# bfloat16, on the first CUDA device.
GPU = (
    Row("ViT-B-32", 256, "forward", ("exact", "low rank 16"), 8, 25),
    Row("ViT-B-32", 256, "step", ("exact", "low rank 16"), 8, 25),
    Row("ViT-L-14", 64, "forward", ("exact",), 8, 25),
)
GPU_TARGETS = {("ViT-B-32", "exact"): 2.0, ("ViT-B-32", "low rank 16"): 1.45, ("ViT-L-14", "exact"): 1.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true")
    size.add_argument("--full", action="store_true")
    size.add_argument("--gpu", action="store_true", help="the rows of a CUDA device, in bfloat16")
    parser.add_argument("--save", action="store_true", help="write the table to infra/bench/results")
    parser.add_argument("--only", default="", help="rows whose description holds this text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu: no CUDA device answers; leave it out")
    device = torch.device("cuda" if options.gpu else "cpu")
    chosen = GPU if options.gpu else FULL if options.full else QUICK
    rows = [row for row in chosen if options.only in f"{row.tower} {row.batch} {row.what}"]
    memory = "memory: peak beyond base and task vectors, beside that of the plain pass"
    head = f"torch {torch.__version__}, {_machine(device, options.threads)}; {memory}"
    lines = [
        head,
        "",
        "| tower | batch | K | what | form | ratio | quartiles | floor | target | memory |",
        "|---" * 10 + "|",
    ]
    print("\n".join(lines), flush=True)
    towers: dict[tuple[str, int], Bench] = {}
    for row in rows:
        if (row.tower, row.n_experts) not in towers:
            towers.clear()  # one tower's task vectors at a time
            towers[row.tower, row.n_experts] = Bench(row.tower, row.n_experts, device)
        for line in towers[row.tower, row.n_experts].measure(row):
            lines.append(line)
            print(line, flush=True)
    if not options.gpu:
        lines += ["", "Rows of a GPU: `python -m infra.bench.bench_merged --gpu`, not yet measured."]
    if options.save:
        kind = "--gpu" if options.gpu else "--full" if options.full else "--quick"
        command = f"python -m infra.bench.bench_merged {kind} --save"
        command += f" --only '{options.only}'" if options.only else ""
        date = datetime.now(UTC).strftime("%Y%m%d")
        slug = "".join(f"{word}_" for word in options.only.lower().split())
        text = "\n".join(["# Price of the per-sample merged model", "", f"`{command}`", "", *lines, ""])
        (RESULTS / f"merged_{device.type}_{slug}{date}.md").write_text(text, encoding="utf-8")


class Bench:
    """A tower with random weights, its task vectors, and its merged forms."""

    def __init__(self, tower: str, n_experts: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device, self.dtype = device, torch.bfloat16 if device.type == "cuda" else torch.float32
        self.tower = vision_tower(tower).eval().requires_grad_(False).to(self.device, self.dtype)
        self.image_size: tuple[int, int] = tuple(self.tower.image_size)  # type: ignore[arg-type]
        self.base = dict(self.tower.state_dict())
        self.vectors = TaskVectors(
            {name: 0.01 * self._randn(n_experts, *tensor.shape) for name, tensor in self.base.items()}
        )
        self.n_experts = n_experts
        self.groups = layer_groups(self.base)
        self._forms: dict[str, MergedModel] = {}

    def form(self, name: str) -> MergedModel:
        """The merged model in one of its modes; "low rank 16" is cut to rank 16, "grouped 4" to at most 4 copies."""
        if name not in self._forms:
            kind, _, number = name.rpartition(" ")
            if kind == "low rank":
                cut = random_cut(self.vectors, int(number))
                self._forms[name] = MergedModel(self.tower, self.base, cut, self.groups, verify=False)
            elif kind == "grouped":
                self._forms[name] = MergedModel(
                    self.tower, self.base, self.vectors, self.groups, mode="grouped", max_distance=0.05, verify=False
                )
            else:
                self._forms[name] = MergedModel(self.tower, self.base, self.vectors, self.groups, verify=False)
        return self._forms[name]

    def measure(self, row: Row) -> list[str]:
        """One line a form."""
        images = self._randn(row.batch, 3, *self.image_size)
        weights = torch.softmax(self._randn(row.batch, self.groups.n_groups, self.n_experts), -1)
        passes: dict[str, Callable[[], object]] = {"plain": self._plain(images, row.what)}
        for name in row.forms:
            own = weights[torch.arange(row.batch) % 4] if name.startswith("grouped") else weights
            passes[name] = self._merged(self.form(name), images, own, row.what)
        peak = peak_cuda_bytes if self.device.type == "cuda" else peak_bytes
        memory = {name: peak(run) for name, run in passes.items()}  # warms up, too
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(row.rounds):
            for name, run in passes.items():
                start = time.perf_counter()
                run()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
        lines = []
        for name in row.forms:
            ratios = [mine / plain for mine, plain in zip(seconds[name], seconds["plain"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            target = TARGETS.get((row.what, name)) if row.tower == "ViT-B-32" else None
            if self.device.type == "cuda":
                target = GPU_TARGETS.get((row.tower, name)) if row.what == "forward" else None
            lines.append(
                f"| {row.tower} | {row.batch} | {row.n_experts} | {row.what} | {name} | {middle:.2f} | "
                f"{low:.2f}–{high:.2f} | {self.floor(row, name):.2f} | {target or ''} | "
                f"{_mib(memory[name])} (plain {_mib(memory['plain'])}) |"
            )
        plain = statistics.median(seconds["plain"])
        lines.append(f"| {row.tower} | {row.batch} | | {row.what} | plain | 1 ({1e3 * plain:.0f} ms) | | | | |")
        return lines

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def _plain(self, images: Tensor, what: str) -> Callable[[], object]:
        if what == "forward":
            return lambda: _without_grad(lambda: self.tower(images))
        leaf = images.clone().requires_grad_()
        return lambda: torch.autograd.grad(self.tower(leaf).sum(), leaf)

    def _merged(self, form: MergedModel, images: Tensor, weights: Tensor, what: str) -> Callable[[], object]:
        if what == "forward":
            return lambda: _without_grad(lambda: form(images, weights=weights))
        leaf = weights.clone().requires_grad_()
        return lambda: torch.autograd.grad(form(images, weights=leaf).sum(), leaf)

    def floor(self, row: Row, form: str) -> float:
        """FLOPs of a form over those of the plain pass; attention products count on both sides."""
        images = self._randn(1, 3, *self.image_size)
        counter = FlopCounterMode(display=False)
        torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see into the fused layer
        with counter, torch.no_grad():
            self.tower(images)
        torch.backends.mha.set_fastpath_enabled(True)
        counts = counter.get_flop_counts()["Global"]
        forward = sum(counts.values())
        linear = forward - sum(n for op, n in counts.items() if "bmm" in str(op) or "attention" in str(op))
        merging = 2 * self.n_experts * sum(t.numel() for t in self.base.values())
        sides = sum(sum(t.flatten(1).shape) for t in self.base.values() if t.ndim > 1)
        n_tokens = linear / (2 * sum(t.numel() for t in self.base.values() if t.ndim > 1))
        kind, _, number = form.rpartition(" ")
        if kind == "low rank":
            extra, extra_back = (2 * n_tokens * self.n_experts * int(number) * sides,) * 2
        elif kind == "grouped":
            extra, extra_back = merging * int(number) / row.batch, 0.0
        else:  # backward forms the tiles anew, takes dW = dy x^T and contracts it with the task vectors
            extra, extra_back = merging, 2 * merging + linear
        if row.what == "forward":
            return float((forward + extra) / forward)
        return float((2 * forward + extra + extra_back) / (2 * forward))


def vision_tower(name: str) -> nn.Module:
    """open_clip's vision tower of this name with random weights; "demo" is the demo's."""
    import open_clip

    if name != "demo":
        tower: nn.Module = open_clip.create_model(name).visual
        return tower
    config = {"embed_dim": 96, "vision_cfg": DEMO, "text_cfg": {"width": 64, "heads": 1, "layers": 1}}
    with TemporaryDirectory() as folder:
        (Path(folder) / "bench-demo.json").write_text(json.dumps(config), encoding="utf-8")
        open_clip.add_model_config(folder)
        tower = open_clip.create_model("bench-demo").visual
    return tower


def random_cut(vectors: TaskVectors, rank: int) -> CompressedVectors:
    """Factors of this rank with the shapes of a cut, without the minutes that the decompositions would take."""
    factors, dense = {}, {}
    for name, stacked in vectors.vectors.items():
        n_experts, *own = stacked.flatten(2).shape if stacked.ndim > 2 else stacked.shape
        if len(own) == 2 and rank * sum(own) < own[0] * own[1]:
            left, right = stacked.new_empty(n_experts, own[0], rank), stacked.new_empty(n_experts, rank, own[1])
            factors[name] = (0.01 * left.normal_(), 0.01 * right.normal_())
        else:
            dense[name] = stacked
    shapes = {name: tuple(stacked.shape[1:]) for name, stacked in vectors.vectors.items()}
    return CompressedVectors(factors, dense, {}, shapes, dict.fromkeys(shapes, 0.0))


def peak_bytes(run: Callable[[], object]) -> int | None:
    """Peak resident memory of one run beyond what was resident before it; None where the kernel does not tell."""
    run()
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        CDLL(None).malloc_trim(0)  # what an earlier run gave back must count when this one takes it
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status_bytes("VmRSS")
        run()
        return _status_bytes("VmHWM") - before
    except OSError:
        return None


def peak_cuda_bytes(run: Callable[[], object]) -> int:
    """Peak allocated device memory of one run beyond what was allocated before it."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _machine(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, bfloat16"
    return f"{threads} threads, {platform.processor() or platform.machine()}, kernel: {kernel_name()}"


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def _without_grad(run: Callable[[], object]) -> object:
    with torch.no_grad():
        return run()


def _mib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
