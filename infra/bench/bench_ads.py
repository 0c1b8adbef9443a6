"""ADS straight from CSR: time against the bytes it must read, memory against its budget, over edges and over classes.

    python -m infra.bench.bench_ads --quick          # toy size, half a minute
    python -m infra.bench.bench_ads --save           # up to 10^7 edges, some minutes; table and picture
    python -m infra.bench.bench_ads --gpu --save     # 10^8 edges on the first CUDA device

Mean degree 50. "clusters": the neighbours of a row are in its own cluster of 200 rows, which lie anywhere, as samples
of a kind do; "anywhere": neighbours are drawn from all rows, so that no cache helps. The floor counts 4 bytes for each
class of each neighbour and of each anchor, and once more for each row, whose sum and largest entry are needed first,
over the rate of a large copy in the same round, bytes read and written both counted there. Evidence lies in huge
pages, as the stage `score` puts it, and what is copied for the floor does, too.
"""

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from unittest.mock import patch

import torch
from torch import Tensor

from bd_core import edge_distance
from bd_core.discrepancy import Discrepancy, adjacency_discrepancy, discrepancy, positive_quantile
from bd_core.graph_kernel import graph_kernel_name
from bd_core.huge_pages import empty
from bd_core.neighbourhood import Neighbourhoods
from bd_core.quantile import quantile_of_parts
from infra.bench.curves import Curve, picture
from infra.bench.floors import RESULTS, PeakMemory, copy_bytes_per_s, machine, seconds, slug, spread

CLASSES, DEGREE, CLUSTER = 758, 50, 200
BUDGET_BYTES = 2**27
QUICK, FULL, GPU = (20_000, 100_000), (100_000, 1_000_000, 10_000_000), (10_000_000, 100_000_000)
QUICK_CLASSES, FULL_CLASSES = (10, 1_000), (10, 100, 1_000, 10_000)
TARGETS = "targets: at most 3 of the floor, peak within the budget"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy size")
    parser.add_argument("--gpu", action="store_true", help="on the first CUDA device; target: at most 2 of the floor")
    parser.add_argument("--save", action="store_true", help="write table and picture to infra/bench/results")
    arguments = parser.parse_args()
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu: no CUDA device answers; leave it out")
    device = torch.device("cuda" if arguments.gpu else "cpu")
    rounds = 2 if arguments.quick else 3
    lines = [f"{machine(device)}, kernel {graph_kernel_name()}; {TARGETS}", ""]
    print("\n".join(lines), flush=True)
    panels: dict[str, list[Curve]] = {}
    sizes = GPU if arguments.gpu else QUICK if arguments.quick else FULL
    lines += by_edges(sizes, rounds, device, panels)
    lines += by_classes(QUICK_CLASSES if arguments.quick else FULL_CLASSES, sizes[0], rounds, device, panels)
    if not arguments.gpu:
        lines += other_forms(sizes[-1], sizes[0], rounds)
        lines.append("Rows of a GPU: `python -m infra.bench.bench_ads --gpu --save`, not yet measured.")
    if arguments.save:
        name = f"ads_{slug(device)}_{datetime.now(UTC).strftime('%Y%m%d')}"
        flags = "".join(f" --{flag}" for flag in ("quick", "gpu") if getattr(arguments, flag))
        head = ["# ADS straight from CSR", "", f"`python -m infra.bench.bench_ads{flags} --save`", ""]
        text = "\n".join([*head, *lines, "", f"![curves]({name}.png)", ""])
        (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
        picture(RESULTS / f"{name}.png", panels)


def by_edges(sizes: tuple[int, ...], rounds: int, device: torch.device, panels: dict[str, list[Curve]]) -> list[str]:
    """The table over edges, both kinds of graph; its curves go to `panels`."""
    lines = [f"## {CLASSES} classes, by edges", "", f"| neighbours | {HEAD} |", "|---" * 9 + "|"]
    print("\n".join(lines), flush=True)
    times, memory = [], []
    for kind, make in KINDS.items():
        found = []
        for n_edges in sizes:
            graph = make(n_edges // DEGREE).to(device)
            spent, floor, peak, line = _measure(graph, CLASSES, rounds, device)
            found.append((float(graph.n_edges), spent, floor, peak))
            lines.append(f"| {kind} | {line} |")
            print(lines[-1], flush=True)
        edges, spent_s, floor_s, peaks = (list(each) for each in zip(*found, strict=True))
        times.append(Curve(f"neighbours {kind}", edges, spent_s))
        memory.append(Curve(f"neighbours {kind}", edges, [max(peak, 2**20) / 2**20 for peak in peaks]))
    times.append(Curve("bytes at the copy rate", edges, floor_s, floor=True))
    memory.append(Curve("budget", edges, [BUDGET_BYTES / 2**20] * len(edges), floor=True))
    memory.append(Curve("E x C would be", edges, [4 * CLASSES * each / 2**20 for each in edges], floor=True))
    panels |= {"seconds by edges": times, "MiB beyond inputs and results by edges": memory}
    return [*lines, ""]


def by_classes(
    counts: tuple[int, ...], n_edges: int, rounds: int, device: torch.device, panels: dict[str, list[Curve]]
) -> list[str]:
    """The table over classes; its curves go to `panels`."""
    lines = ["## By classes, neighbours in clusters", "", f"| classes | {HEAD} |", "|---" * 9 + "|"]
    print("\n".join(lines), flush=True)
    graph = clusters(n_edges // DEGREE).to(device)
    times, floors = [], []
    for n_classes in counts:
        spent, floor, _, line = _measure(graph, n_classes, rounds, device)
        times.append(spent)
        floors.append(floor)
        lines.append(f"| {n_classes} | {line} |")
        print(lines[-1], flush=True)
    classes = [float(count) for count in counts]
    panels["seconds by classes"] = [
        Curve(f"{graph.n_edges:,} edges", classes, times),
        Curve("bytes at the copy rate", classes, floors, floor=True),
    ]
    return [*lines, ""]


def other_forms(n_values: int, n_edges: int, rounds: int) -> list[str]:
    """torch without the compiled kernel, and epsilon from parts beside a sort."""
    graph = clusters(n_edges // DEGREE)
    alpha = _alpha(graph.n_rows, CLASSES, torch.device("cpu"))
    ads = torch.rand(n_values)
    parts = ads.chunk(16)

    def without_kernel() -> Tensor:
        with patch.object(edge_distance, "kernel_runs", lambda *tensors: False):
            return adjacency_discrepancy(alpha, graph.csr, budget_bytes=BUDGET_BYTES)

    forms: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        f"ADS of {graph.n_edges:,} edges: torch over kernel": (
            without_kernel,
            lambda: adjacency_discrepancy(alpha, graph.csr, budget_bytes=BUDGET_BYTES),
        ),
        f"epsilon of {n_values:,} values: counts of 16 parts over a sort": (
            lambda: quantile_of_parts(lambda: parts, 0.5),
            lambda: positive_quantile(ads, 0.5),
        ),
    }
    lines = ["## Other forms", "", "| form | seconds | other's seconds | ratio |", "|---|---|---|---|"]
    for name, (first, second) in forms.items():
        pairs = [(seconds(first), seconds(second)) for _ in range(rounds)]
        ratio = spread([one / other for one, other in pairs])
        lines.append(f"| {name} | {spread([a for a, _ in pairs])} | {spread([b for _, b in pairs])} | {ratio} |")
    print("\n".join(lines), flush=True)
    return [*lines, ""]


class Graph:
    """A radius graph of n rows without cosines to speak of."""

    def __init__(self, csr: Neighbourhoods) -> None:
        self.csr, self.n_rows, self.n_edges = csr, csr.n_anchors, len(csr.neighbours)

    def to(self, device: torch.device) -> "Graph":
        """The same on a device."""
        csr = self.csr
        return Graph(Neighbourhoods(csr.offsets.to(device), csr.neighbours.to(device), csr.cosine.to(device)))


def clusters(n_rows: int) -> Graph:
    """Each row linked to about DEGREE of the CLUSTER rows of its kind, which lie anywhere."""
    generator = torch.Generator().manual_seed(0)
    size = min(CLUSTER, n_rows)
    n_rows = n_rows // size * size
    members = torch.randperm(n_rows, generator=generator).view(-1, size).sort(dim=1).values
    anchors, others = [], []
    for some in members.split(100):  # type: ignore[no-untyped-call]
        linked = torch.rand(len(some), size, size, generator=generator) < DEGREE / size
        linked.diagonal(dim1=1, dim2=2).fill_(False)
        cluster, i, j = linked.nonzero(as_tuple=True)
        anchors.append(some[cluster, i])
        others.append(some[cluster, j])
    anchor = torch.cat(anchors)
    order = anchor.argsort(stable=True)
    return Graph(_csr(torch.bincount(anchor, minlength=n_rows), torch.cat(others)[order]))


def anywhere(n_rows: int) -> Graph:
    """Each row linked to DEGREE rows drawn from all."""
    generator = torch.Generator().manual_seed(0)
    stride = n_rows // DEGREE
    drawn = torch.randint(stride, (n_rows, DEGREE), generator=generator) + torch.arange(DEGREE) * stride
    return Graph(_csr(torch.full((n_rows,), DEGREE), drawn.flatten()))


KINDS: dict[str, Callable[[int], Graph]] = {"clusters": clusters, "anywhere": anywhere}
HEAD = "edges | rows | seconds | floor | ratio | GB/s | peak beyond inputs and results | budget"


def _csr(degree: Tensor, neighbours: Tensor) -> Neighbourhoods:
    offsets = torch.cat([degree.new_zeros(1), degree.cumsum(0)])
    return Neighbourhoods(offsets, neighbours, torch.ones(len(neighbours)))


def _alpha(n_rows: int, n_classes: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return empty((n_rows, n_classes), torch.float32, device).uniform_(generator=generator).mul_(5).add_(1)


def _measure(graph: Graph, n_classes: int, rounds: int, device: torch.device) -> tuple[float, float, int, str]:
    """Median seconds, the floor's, peak bytes, and the cells of the table."""
    alpha = _alpha(graph.n_rows, n_classes, device)
    must_read = 4 * n_classes * (graph.n_edges + graph.csr.n_anchors + graph.n_rows)
    times, floors, peaks = [], [], []
    for _ in range(rounds):
        floors.append(must_read / copy_bytes_per_s(device))
        made: list[Discrepancy] = []
        with PeakMemory() as peak:
            times.append(
                seconds(lambda made=made: made.append(discrepancy(alpha, graph.csr, budget_bytes=BUDGET_BYTES)), device)
            )
            results = sum(each.numel() * each.element_size() for each in vars(made[0]).values())
        peaks.append(peak.bytes - results)
    middle = rounds // 2
    spent, floor = sorted(times)[middle], sorted(floors)[middle]
    ratios = [time / least for time, least in zip(times, floors, strict=True)]
    cells = [f"{graph.n_edges:,}", f"{graph.n_rows:,}", spread(times), spread(floors), spread(ratios)]
    cells += [f"{must_read / spent / 1e9:.1f}", f"{max(peaks) / 2**20:.0f} MiB", f"{BUDGET_BYTES / 2**20:.0f} MiB"]
    return spent, floor, max(peaks), " | ".join(cells)


if __name__ == "__main__":
    main()
