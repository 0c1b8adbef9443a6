"""Radius graphs: time and memory against the bare matrix product, against FAISS Flat, over rows and over edges.

    python -m infra.bench.bench_neighbours --quick          # toy size, a minute
    python -m infra.bench.bench_neighbours --save           # up to 100k x 512, some minutes; table and picture
    python -m infra.bench.bench_neighbours --gpu --save     # 1M x 512 on the first CUDA device

Clustered unit vectors, mean degree about 50 at cosine 0.5; the demo's features too where its store is found. The floor
is the time of the n x n product, 2 n^2 D operations at the best rate torch reaches in the same round; a self graph
needs half of them. FAISS is given the first rows as queries and its time is scaled to all.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from bd_core import radius_scan
from bd_core.graph_kernel import graph_kernel_name
from bd_core.neighbourhood import Neighbourhoods, adaptive_min_cosine, exact_cosine, radius_graph, rounding_bound
from infra.bench.curves import Curve, picture
from infra.bench.floors import (
    RESULTS,
    PeakMemory,
    copy_bytes_per_s,
    machine,
    matmul_flops_per_s,
    seconds,
    slug,
    spread,
)
from infra.bench.synthetic_pool import MIN_COSINE, Clusters

WIDTH = 512
QUICK, FULL, GPU = (2_000, 5_000), (5_000, 10_000, 20_000, 50_000, 100_000), (100_000, 1_000_000)
DEGREES = (5, 50, 500, 2000)
FAISS_QUERIES = 8192
TARGETS = "targets: at most 1.5 of the half floor, FAISS at least 2 times slower, the same edges"
GPU_TARGET = "target: at most 2.5 of the floor in bfloat16"


@dataclass(frozen=True)
class Options:
    """What a section is asked to do."""

    quick: bool
    device: torch.device
    store: Path

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of the self graphs."""
        return GPU if self.device.type == "cuda" else QUICK if self.quick else FULL

    @property
    def rounds(self) -> int:
        """How often all forms run in turn."""
        return 2 if self.quick else 3


@dataclass(frozen=True)
class Point:
    """One self graph, measured."""

    rows: int
    edges: int
    graph_s: float
    floor_s: float
    peak_bytes: int
    faiss_s: float | None = None


# A section prints and returns its lines and gives its curves to the picture; back ends add theirs here.
Section = Callable[[Options], tuple[list[str], dict[str, list[Curve]]]]


def exact_by_rows(options: Options) -> tuple[list[str], dict[str, list[Curve]]]:
    """The self graph of n rows, beside its floor and FAISS Flat."""
    head = "| rows | edges | seconds | of the floor | of the half floor | FAISS / ours | differing edges | peak beyond "
    lines = ["## Exact, by rows", "", head + "features | of it the graph |", "|---" * 9 + "|"]
    print("\n".join(lines), flush=True)
    points = []
    for n_rows in options.sizes:
        features = torch.from_numpy(Clusters(n_rows, WIDTH).rows(n_rows, 0)).to(options.device)
        rounds = 1 if n_rows > 50_000 and options.quick else options.rounds if n_rows <= 50_000 else 2
        point, line = _measure(features, MIN_COSINE, rounds, faiss=options.device.type == "cpu")
        points.append(point)
        lines.append(line)
        print(line, flush=True)
    rows = [float(point.rows) for point in points]
    times = [
        Curve("radius_graph", rows, [point.graph_s for point in points]),
        Curve("product of all pairs", rows, [point.floor_s for point in points], floor=True),
        Curve("half of it", rows, [point.floor_s / 2 for point in points], floor=True),
    ]
    if points[0].faiss_s is not None:
        times.append(Curve("FAISS Flat", rows, [point.faiss_s or 0.0 for point in points]))
    memory = [
        Curve("peak beyond features", rows, [point.peak_bytes / 2**30 for point in points]),
        Curve("the graph", rows, [_graph_bytes(point.rows, point.edges) / 2**30 for point in points], floor=True),
    ]
    return [*lines, ""], {"seconds by rows": times, "GiB by rows": memory}


def exact_by_edges(options: Options) -> tuple[list[str], dict[str, list[Curve]]]:
    """The self graph of some rows at growing radii."""
    n_rows = 2_000 if options.quick else 20_000
    features = torch.from_numpy(Clusters(n_rows, WIDTH).rows(n_rows, 0)).to(options.device)
    cosine = (features[:256] @ features.T).flatten().sort(descending=True).values
    lines = [f"## Exact, by edges, {n_rows} rows", "", "| mean degree | edges | seconds | of the half floor |"]
    lines[-1] += " peak beyond features | of it the graph |"
    lines.append("|---" * 6 + "|")
    print("\n".join(lines), flush=True)
    points = []
    for degree in (degree for degree in DEGREES if degree < n_rows / 4):
        point, _ = _measure(features, min(1.0, cosine[256 * (degree + 1)].item()), options.rounds, faiss=False)
        points.append(point)
        cells = [f"{point.edges / n_rows:.0f}", f"{point.edges:,}", f"{point.graph_s:.2f}"]
        cells += [f"{2 * point.graph_s / point.floor_s:.2f}", *_memory(point)]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    edges = [float(point.edges) for point in points]
    times = [
        Curve(f"radius_graph, {n_rows} rows", edges, [point.graph_s for point in points]),
        Curve("half the product", edges, [point.floor_s / 2 for point in points], floor=True),
    ]
    memory = [
        Curve("peak beyond features", edges, [point.peak_bytes / 2**30 for point in points]),
        Curve("the graph", edges, [_graph_bytes(point.rows, point.edges) / 2**30 for point in points], floor=True),
    ]
    return [*lines, ""], {"seconds by edges": times, "GiB by edges": memory}


def other_forms(options: Options) -> tuple[list[str], dict[str, list[Curve]]]:
    """A shard against the pool, radii by local density, and torch without the compiled kernel."""
    n_rows = 2_000 if options.quick else 20_000
    features = torch.from_numpy(Clusters(n_rows, WIDTH).rows(n_rows, 0)).to(options.device)
    shard = torch.arange(n_rows // 4, device=options.device)
    forms: dict[str, tuple[float, Callable[[], object]]] = {
        "a quarter of the rows against all": (
            0.25,
            lambda: radius_graph(features[shard], MIN_COSINE, base_MD=features, self_rows=shard),
        ),
        "adaptive radii of a quarter, target degree 32": (
            0.25,
            lambda: adaptive_min_cosine(features[shard], 32, features, self_rows=shard),
        ),
        "self graph, bfloat16 product": (0.5, lambda: radius_graph(features, MIN_COSINE, product=torch.bfloat16)),
        "self graph, torch": (0.5, lambda: _without_kernel(features)),
    }
    if options.device.type == "cpu":
        del forms["self graph, bfloat16 product"]  # slow on most processors, and there for the edges alone
    lines = [f"## Other forms, {n_rows} rows", "", "| form | seconds | of the products it needs |", "|---|---|---|"]
    print("\n".join(lines), flush=True)
    for name, (share, run) in forms.items():
        times, ratios = [], []
        for _ in range(options.rounds):
            floor = share * 2 * n_rows**2 * WIDTH / matmul_flops_per_s(WIDTH, options.device)
            times.append(seconds(run, options.device))
            ratios.append(times[-1] / floor)
        lines.append(f"| {name} | {spread(times)} | {spread(ratios)} |")
        print(lines[-1], flush=True)
    return [*lines, ""], {}


def demo_features(options: Options) -> tuple[list[str], dict[str, list[Curve]]]:
    """The self graph of the demo's own features, where its store is."""
    files = sorted(options.store.glob("embed/*/features.npy"))
    if not files:
        return [f"The demo's features: none in {options.store.name}, `make demo` makes them.", ""], {}
    rows = np.concatenate([np.load(file).astype(np.float32) for file in files])
    features = torch.nn.functional.normalize(torch.from_numpy(rows), dim=1).to(options.device)
    cosine = (features[:256] @ features.T).flatten().sort(descending=True).values
    radius = min(1.0, cosine[256 * 51].item())
    _, line = _measure(features, radius, options.rounds, faiss=options.device.type == "cpu")
    lines = [f"## The demo's features, {len(features)} x {features.shape[1]}, cosine {radius:.3f}", "", line, ""]
    print("\n".join(lines), flush=True)
    return lines, {}


SECTIONS: dict[str, Section] = {
    "exact by rows": exact_by_rows,
    "exact by edges": exact_by_edges,
    "other forms": other_forms,
    "demo features": demo_features,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy size")
    parser.add_argument("--gpu", action="store_true", help="on the first CUDA device")
    parser.add_argument("--save", action="store_true", help="write table and picture to infra/bench/results")
    parser.add_argument("--store", type=Path, default=Path("bd-store"), help="where the demo's features are")
    parser.add_argument("--only", default="", help="sections whose name holds this text")
    arguments = parser.parse_args()
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu: no CUDA device answers; leave it out")
    device = torch.device("cuda" if arguments.gpu else "cpu")
    options = Options(arguments.quick, device, arguments.store)
    rate = matmul_flops_per_s(WIDTH, device, torch.bfloat16 if arguments.gpu else torch.float32) / 1e9
    copies = copy_bytes_per_s(device) / 1e9
    lines = [
        f"{machine(device)}, kernel {graph_kernel_name()}; at the start {rate:.0f} GFLOP/s in products and "
        f"{copies:.1f} GB/s in copies; {GPU_TARGET if arguments.gpu else TARGETS}",
        "",
    ]
    print("\n".join(lines), flush=True)
    panels: dict[str, list[Curve]] = {}
    for name, section in SECTIONS.items():
        if arguments.only in name:
            found, curves = section(options)
            lines += found
            panels |= curves
    if not arguments.gpu:
        lines.append("Rows of a GPU: `python -m infra.bench.bench_neighbours --gpu --save`, not yet measured.")
    if arguments.save:
        name = f"neighbours_exact_{slug(device)}_{datetime.now(UTC).strftime('%Y%m%d')}"
        flags = "".join(f" --{flag}" for flag in ("quick", "gpu") if getattr(arguments, flag))
        command = f"`python -m infra.bench.bench_neighbours{flags} --save`"
        lines = ["# Radius graphs", "", command, "", *lines, "", f"![curves]({name}.png)", ""]
        (RESULTS / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
        picture(RESULTS / f"{name}.png", panels)


def _measure(features: Tensor, min_cosine: float, rounds: int, faiss: bool) -> tuple[Point, str]:
    """One self graph with its floor and FAISS in turn; the point of the medians and its line of the table."""
    device, n_rows, width = features.device, *features.shape
    on_gpu = device.type == "cuda"
    product = torch.bfloat16 if on_gpu else torch.float32
    times, floors, rivals, differing = [], [], [], 0
    graph: Neighbourhoods | None = None
    radius_graph(features[:2048], min_cosine, product=product)  # loads libraries, wakes threads
    for _ in range(rounds):
        floors.append(2 * n_rows**2 * width / matmul_flops_per_s(width, device, product))
        graph = None
        with PeakMemory() as peak:
            made: list[Neighbourhoods] = []
            times.append(
                seconds(lambda made=made: made.append(radius_graph(features, min_cosine, product=product)), device)
            )
            graph = made.pop()
        if faiss:
            spent, differing = _faiss_flat(features, min_cosine, graph)
            rivals.append(spent)
    assert graph is not None
    middle = len(times) // 2
    point = Point(
        n_rows,
        len(graph.neighbours),
        sorted(times)[middle],
        sorted(floors)[middle],
        torch.cuda.max_memory_allocated() if on_gpu else peak.bytes,
        sorted(rivals)[middle] if rivals else None,
    )
    whole = [spent / floor for spent, floor in zip(times, floors, strict=True)]
    cells = [f"{n_rows:,}", f"{point.edges:,}", spread(times), spread(whole), spread([2 * each for each in whole])]
    if rivals:
        cells += [spread([rival / spent for rival, spent in zip(rivals, times, strict=True)], 1), str(differing)]
    else:
        cells += ["", ""]
    return point, f"| {' | '.join([*cells, *_memory(point)])} |"


def _faiss_flat(features: Tensor, min_cosine: float, graph: Neighbourhoods) -> tuple[float, int]:
    """Seconds FAISS Flat would take for all rows, and how many of its edges are not ours or ours not its.

    Pairs within the rounding of a float32 product of the radius are left out: FAISS decides those by its own rounding.
    """
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    rows, n_rows = features.numpy(), len(features)
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    queries = rows[: min(n_rows, FAISS_QUERIES)]
    strict = float(np.nextafter(np.float32(min_cosine), np.float32(-np.inf)))
    kept = []
    spent = seconds(lambda: kept.append(index.range_search(queries, strict)))
    limits, _, found = kept[0]
    anchor = np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64)).astype(np.int64))
    theirs = (anchor * n_rows + found)[anchor != found]
    last = int(graph.offsets[len(queries)])
    ours = (graph.anchors()[:last] * n_rows + graph.neighbours[:last]).numpy()
    pairs = torch.from_numpy(np.setxor1d(theirs, ours))
    cosine = exact_cosine(features, features, pairs // n_rows, pairs % n_rows)
    surely = (cosine - min_cosine).abs() > rounding_bound(rows.shape[1])
    return spent * n_rows / len(queries), int(surely.sum())


def _without_kernel(features: Tensor) -> Neighbourhoods:
    with patch.object(radius_scan, "kernel_runs", lambda *tensors: False):
        return radius_graph(features, MIN_COSINE)


def _graph_bytes(n_rows: int, n_edges: int) -> int:
    return 8 * (n_rows + 1) + 12 * n_edges


def _memory(point: Point) -> list[str]:
    return [f"{each / 2**20:.0f} MiB" for each in (point.peak_bytes, _graph_bytes(point.rows, point.edges))]


if __name__ == "__main__":
    main()
