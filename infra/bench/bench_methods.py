"""Merging methods beside FusionBench and mergekit: seconds, memory and the floor, at the shapes of a ViT-B/32.

    python -m infra.bench.bench_methods --quick                  # one block a tower, ours alone
    python -m infra.bench.bench_methods --fusionbench PYTHON --mergekit PYTHON --save

Each side runs in a process and environment of its own (infra/bench/peers says how to make them) on the same random
checkpoints, K = 8. Sides take turns; a ratio is taken within a round, the median over rounds is printed with its
quartiles. Memory is the process's highest resident size during a merge less its size before, over one model: what a
merge needs beyond its inputs, the result included. The peers hold many models at once, so they are compared on the
first `--layers` blocks of each tower; ours is measured on the whole model, too (matrix methods on a part of it). The
floor of entry-wise methods is the bytes that must be read and written at the measured copy rate; that of matrix methods
the products and decompositions of the plain dense algorithm, counted in infra/bench/methods_floor.py, at the rate of a
matrix product.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import selectors
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from infra.bench.methods_floor import MATRIX, floor_seconds, measured_rates
from infra.bench.methods_scaling import scaling
from infra.bench.peers.worker import shapes

RESULTS = Path(__file__).parent / "results"
EXPERTS, WHOLE = 8, 12
MEMORY_TARGET = 1.5
TABLES = ["token_embedding.weight", "positional_embedding", "visual.positional_embedding"]
AS_THEIRS = {"exclude": ["embedding"]}  # the matrices FusionBench takes once the tables are excluded
PACKAGES = {"fusionbench": "fusion-bench 0.2.33", "mergekit": "mergekit 0.1.5"}


@dataclass(frozen=True)
class Case:
    """One method of ours, and what to call it with at each peer that gives the same result."""

    title: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    peers: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    target: float | None = None  # times faster than every peer
    whole: bool = True  # whether it is also run on the whole model
    same: bool = True  # whether the results can be compared


FB, MK = "fusionbench", "mergekit"
CASES = (
    Case("weight average", "weight_average", peers={FB: ("weight_average", {}), MK: ("weight_average", {})}),
    Case("Task Arithmetic", "task_arithmetic", peers={FB: ("task_arithmetic", {}), MK: ("task_arithmetic", {})}),
    Case("Ties, global", "ties", peers={FB: ("ties", {})}, target=5.0),
    Case("Ties, per tensor", "ties", {"trim": "per_tensor"}, {MK: ("ties", {})}, 5.0),
    Case("DARE", "dare", peers={FB: ("dare", {}), MK: ("dare", {})}, same=False),
    Case("PCB", "pcb"),
    Case("Model Stock", "model_stock", peers={MK: ("model_stock", {})}),
    Case("Model Stock, angle", "model_stock", {"average": "angle"}, {FB: ("model_stock", {})}, whole=False),
    Case("ISO-C", "iso_c", peers={FB: ("iso_c", {"exclude_keys": TABLES})}, target=3.0),
    Case("TSV-M", "tsv_m", peers={FB: ("tsv_m", {"exclude_keys": TABLES})}, target=3.0),
    Case(
        "WUDI exact (peer: 300 steps)",
        "wudi_exact",
        AS_THEIRS,
        {FB: ("wudi", {"exclude_keys": TABLES})},
        3.0,
        True,
        False,
    ),
    Case("WUDI, 300 steps", "wudi", AS_THEIRS, whole=False),
    Case("WUDI, 2 steps, for its memory", "wudi", AS_THEIRS | {"steps": 2}),
    Case("ACE", "ace"),
    Case("ACE, paper", "ace", {"variant": "paper"}),
)


def main() -> None:
    """Measure, print, and save where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the cut model only, one round, no scaling")
    parser.add_argument("--fusionbench", metavar="PYTHON", help="the interpreter of its environment")
    parser.add_argument("--mergekit", metavar="PYTHON", help="the interpreter of its environment")
    parser.add_argument("--layers", type=int, default=1, help="blocks of each tower beside the peers")
    parser.add_argument("--whole-layers", type=int, default=WHOLE, help="blocks of each tower for ours alone")
    parser.add_argument("--matrix-layers", type=int, default=3, help="the same for matrix methods, linear in it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit-s", type=float, default=90.0, help="the longest a side may take for one merge")
    parser.add_argument("--only", default="", help="cases whose title holds this text")
    parser.add_argument("--skip-scaling", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true", help="write table and picture to infra/bench/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = [case for case in CASES if options.only.lower() in case.title.lower()]
    rates = measured_rates()
    lines = [
        f"torch {torch.__version__}, {options.threads} threads, {platform.processor() or platform.machine()}; "
        + ", ".join(text for side, text in PACKAGES.items() if getattr(options, side)),
        "",
        f"Copy rate {rates.copy_bytes_s / 1e9:.1f} GB/s (read and written), "
        f"matrix product {rates.flops_s / 1e9:.0f} GFLOP/s. K = {EXPERTS}.",
    ]
    print("\n".join(lines), flush=True)
    sides = {"ours": sys.executable} | {name: getattr(options, name) for name in (FB, MK) if getattr(options, name)}
    lines += beside_peers(cases, sides, options)
    if not options.quick:
        lines += whole_model(cases, rates, options)
        if not options.skip_scaling:
            with Side("ours", sys.executable, options.threads) as side:
                picture = RESULTS / f"methods_scaling_{_hardware()}_{_today()}.svg" if options.save else None
                lines += scaling(side, options.limit_s, picture)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        text = "\n".join(["# Merging methods beside their peers", "", f"`{_command(options)}`", "", *lines, ""])
        (RESULTS / f"methods_{_hardware()}_{_today()}.md").write_text(text, encoding="utf-8")


class Side:
    """A process that merges on request; started again when a merge took too long or died."""

    def __init__(self, name: str, python: str, threads: int, memory_share: float = 0.7) -> None:
        self.name, self._python, self._threads, self._share = name, python, threads, memory_share
        self._layout: dict[str, int] = {}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def states(self, layers: int, experts: int) -> int:
        """Bytes of one model; the checkpoints are made when they differ from the last ones."""
        self._layout = {"layers": layers, "experts": experts}
        return int(self._ask({"do": "states", **self._layout}, 600.0)["model_bytes"])

    def merge(
        self, method: str, parameters: Mapping[str, Any], limit_s: float, experts: int | None = None
    ) -> dict[str, Any]:
        """Seconds and peak bytes of one merge, or why it failed."""
        request = {"do": "merge", "method": method, "parameters": dict(parameters)}
        if experts is not None:
            request["experts"] = experts
        try:
            return self._ask(request, limit_s)
        except TimeoutError:
            self.stop()
            self.states(**self._layout)
            return {"failed": f"over {limit_s:g} s"}
        except EOFError:
            self.stop()
            self.states(**self._layout)
            return {"failed": "died"}

    def stop(self) -> None:
        """Ends the process this one started."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(limit_s):
                raise TimeoutError
        line = process.stdout.readline()
        while line and not line.startswith("{"):  # a peer's progress bar
            line = process.stdout.readline()
        if not line:
            raise EOFError
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _start(self) -> subprocess.Popen[str]:
        command = [self._python, "-m", "infra.bench.peers.worker", self.name, "--threads", str(self._threads)]
        command += ["--memory-bytes", str(int(self._share * _available_bytes()))]
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root
        )
        return self._process


def beside_peers(cases: list[Case], pythons: Mapping[str, str], options: argparse.Namespace) -> list[str]:
    """One line a case and peer on the cut model."""
    names = shapes(options.layers)
    size = sum(torch.Size(shape).numel() for shape in names.values())
    lines = [
        "",
        f"## The first {options.layers} of {WHOLE} blocks of each tower, {size / 1e6:.1f} M parameters",
        "",
        "| method | peer | ours s | peer s | peer / ours | quartiles | target | models: ours | peer | difference |",
        "|---" * 10 + "|",
    ]
    print("\n".join(lines), flush=True)
    sides = {name: Side(name, python, options.threads) for name, python in pythons.items()}
    try:
        sizes = {name: side.states(options.layers, EXPERTS) for name, side in sides.items()}
        for case in cases:
            for line in _beside(case, sides, sizes["ours"], options):
                lines.append(line)
                print(line, flush=True)
    finally:
        for side in sides.values():
            side.stop()
    return lines


def _beside(case: Case, sides: Mapping[str, Side], model_bytes: int, options: argparse.Namespace) -> list[str]:
    calls = {"ours": (case.method, case.parameters)}
    calls |= {peer: call for peer, call in case.peers.items() if peer in sides}
    first = {name: sides[name].merge(*call, options.limit_s) for name, call in calls.items()}  # warms up, too
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    slowest = max(answer.get("seconds", 0.0) for answer in first.values())
    # A merge of a quarter of the limit is long enough to need no warming up, and is taken once.
    n_rounds = 0 if options.quick or 4 * slowest > options.limit_s else options.rounds
    for _ in range(n_rounds):
        for name, call in calls.items():
            if "failed" not in first[name]:
                rounds[name].append(sides[name].merge(*call, options.limit_s).get("seconds", options.limit_s))
    seconds = {name: rounds[name] or [first[name].get("seconds", float("nan"))] for name in calls}
    ours = statistics.median(seconds["ours"])
    models = _models(first["ours"], model_bytes)
    if len(calls) == 1:
        return [f"| {case.title} | | {ours:.2f} | | | | | {models} | | |"]
    found = []
    for peer in list(calls)[1:]:
        head = f"| {case.title} | {peer} | {ours:.2f} |"
        if "failed" in first[peer] or "failed" in first["ours"]:
            why = first[peer].get("failed", first["ours"].get("failed"))
            at_least = f">{options.limit_s / ours:.1f}" if why.startswith("over") else ""
            found.append(f"{head} {why} | {at_least} | | {case.target or ''} | {models} | | |")
            continue
        ratios = [theirs / own for theirs, own in zip(seconds[peer], seconds["ours"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        difference = f"{_difference(first['ours'], first[peer]):.0e}" if case.same else "other result"
        found.append(
            f"{head} {statistics.median(seconds[peer]):.2f} | {middle:.1f} | {low:.1f}–{high:.1f} | "
            f"{case.target or ''} | {models} | {_models(first[peer], model_bytes)} | {difference} |"
        )
    return found


def whole_model(cases: list[Case], rates: Any, options: argparse.Namespace) -> list[str]:
    """One line a case: ours on the whole model, beside the floor."""
    lines = [
        "",
        f"## Ours alone; {WHOLE} blocks a tower are the whole model",
        "",
        "| method | blocks | s | floor s | times the floor | models beyond the inputs | target |",
        "|---" * 7 + "|",
    ]
    print("\n".join(lines), flush=True)
    with Side("ours", sys.executable, options.threads, memory_share=0.9) as side:
        layers = -1
        for case in sorted((case for case in cases if case.whole), key=lambda case: case.method in MATRIX):
            if layers != (layers := options.matrix_layers if case.method in MATRIX else options.whole_layers):
                model_bytes = side.states(layers, EXPERTS)
            answers = [side.merge(case.method, case.parameters, 2 * options.limit_s)]
            if answers[0].get("seconds", 0.0) < 10.0:  # warm, where it is cheap
                answers.append(side.merge(case.method, case.parameters, 2 * options.limit_s))
            if "failed" in answers[0]:
                lines.append(f"| {case.title} | {layers} | {answers[0]['failed']} | | | | |")
            else:
                seconds, floor = answers[-1]["seconds"], floor_seconds(case.method, shapes(layers), EXPERTS, rates)
                memory = max((answer["peak_bytes"] or 0) for answer in answers) / model_bytes
                lines.append(
                    f"| {case.title} | {layers} | {seconds:.2f} | {floor:.2f} | {seconds / floor:.1f} | {memory:.2f} | "
                    f"{MEMORY_TARGET} |"
                )
            print(lines[-1], flush=True)
    return lines


def _models(answer: Mapping[str, Any], model_bytes: int) -> str:
    if "failed" in answer:
        return str(answer["failed"])
    return "?" if answer["peak_bytes"] is None else f"{answer['peak_bytes'] / model_bytes:.2f}"


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """Of sampled steps, relative."""
    mine, other = torch.tensor(ours["steps"]), torch.tensor(theirs["steps"])
    return float((mine - other).norm() / other.norm())


def _command(options: argparse.Namespace) -> str:
    numbers = ("layers", "matrix_layers", "rounds", "limit_s")
    given = ["python -m infra.bench.bench_methods"]
    given += [f"--{name.replace('_', '-')} {getattr(options, name):g}" for name in numbers]
    given += [f"--{peer} PYTHON" for peer in (FB, MK) if getattr(options, peer)]
    given += [f"--{name}" for name in ("quick", "skip_scaling", "save") if getattr(options, name)]
    given += [f"--only '{options.only}'"] if options.only else []
    return " ".join(given).replace("skip_scaling", "skip-scaling")


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def _hardware() -> str:
    return f"{platform.machine()}-{os.cpu_count()}cores"


def _today() -> str:
    return f"{datetime.now(UTC):%Y%m%d}"


if __name__ == "__main__":
    begun = time.perf_counter()
    main()
    print(f"{time.perf_counter() - begun:.0f} s in all")
