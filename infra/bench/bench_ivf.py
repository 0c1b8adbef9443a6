"""IVF and increments: edge recall, throughput against exact, memory, what new shards cost; with curves and a model.

    python -m infra.bench.bench_ivf --quick    # 5k and 10k rows, one minute
    python -m infra.bench.bench_ivf --save     # 10k, 100k and 1M rows
    python -m infra.bench.bench_ivf --model    # fit the points saved last and print

Synthetic clustered unit vectors, mean degree about 50 within cosine 0.5. Every size is a process of its own, so that
its peak memory is its own: the pipeline's stages make the graph by IVF (lists trained, parts built, all joins, fan-in,
written and committed), then 5 % of new shards arrive. A sample of queries is then searched in all parts, in the index
merged from them, and exactly. Ratios: of the merged index to an exact search of the same queries, and in brackets to
what the exact graph takes of a query when each pair is multiplied once (its symmetric half saved).
"""

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bd_core.neighbourhood import Neighbourhoods, radius_graph, radius_graph_between
from infra.bench.ivf_model import draw, report
from infra.bench.process_tree import measure
from infra.bench.synthetic_pool import MIN_COSINE, Clusters, carry_out, embedded, neighbourhood_stages
from pipeline.formats.faiss_index import build_flat, range_search, read_index, use_threads
from pipeline.formats.faiss_ivf import merged, nearest_lists
from pipeline.neighbourhoods.csr import edges_shared, side_by_side
from pipeline.neighbourhoods.features import read_features
from pipeline.neighbourhoods.partitions import Partition, partitions
from pipeline.neighbourhoods.probes import measured_flops, probes_needed
from pipeline.neighbourhoods.radius import QUANTIZER, Radius
from pipeline.neighbourhoods.spec import IndexSpec
from pipeline.stages.index import INDEX
from pipeline.stages.neighbours import measured_recall
from pipeline.store import Artefact, Store

RESULTS = Path(__file__).parent / "results"
WIDTH, SHARD, ADDED = 512, 2048, 0.05
QUERIES, EXACT_QUERIES, HNSW_ROWS = 4096, 512, 20_000
CPU = torch.device("cpu")
SMALL_PARTITION = 2048  # of pools so small that the default would be all of them


def main() -> None:
    """Measure, print, and save where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--quick", action="store_true", help="5,000 and 10,000 rows")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="10 GiB a million rows")
    parser.add_argument("--save", action="store_true", help="write table, points and curves to infra/bench/results")
    parser.add_argument("--model", action="store_true", help="fit the points that were saved last, measure nothing")
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print("POINT " + json.dumps(measured_point(options.point, options.threads, options.scratch)))
        return
    hardware = f"{platform.machine()}-{os.cpu_count()}cores"
    stem = RESULTS / f"ivf_{hardware}_{datetime.now(UTC):%Y%m%d}"
    if options.model:
        saved = sorted(RESULTS.glob(f"ivf_{hardware}_*.json"))
        if not saved:
            sys.exit(f"no ivf_{hardware}_*.json in {RESULTS}; measure with --save first")
        print("\n".join(report(json.loads(saved[-1].read_text(encoding="utf-8")), WIDTH)))
        return
    points = [_in_a_process(n, options) for n in ([5_000, 10_000] if options.quick else options.sizes)]
    lines = [_head(options.threads), *table(points), *report(points, WIDTH)]
    print("\n".join(lines))
    if options.save:
        stem.with_suffix(".json").write_text(json.dumps(points, indent=1) + "\n", encoding="utf-8")
        draw(points, stem.with_suffix(".png"))
        picture = f"\n![time and memory]({stem.name}.png)"
        stem.with_suffix(".md").write_text("\n".join([*lines, picture]) + "\n", encoding="utf-8")


def _in_a_process(n_rows: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "infra.bench.bench_ivf", "--point", str(n_rows)]
    made = measure([*command, "--threads", str(options.threads), "--scratch", str(options.scratch)])
    found = [line for line in made.output.splitlines() if line.startswith("POINT ")]
    if not found:
        sys.exit(made.output)
    point: dict[str, Any] = json.loads(found[0].removeprefix("POINT "))
    print(f"{n_rows:,} rows measured in {made.wall_s:.0f} s", file=sys.stderr)
    return point


def measured_point(n_rows: int, threads: int, scratch: Path) -> dict[str, Any]:
    """Everything of one size."""
    torch.set_num_threads(threads)
    room = min(IndexSpec().rows_per_partition, max(SMALL_PARTITION, n_rows // 8))
    spec = IndexSpec(
        min_cosine=MIN_COSINE,
        backend="ivf",
        rows_per_partition=room,
        # Small pools are given what large ones have by themselves: a sample and a choice that new shards leave alone.
        calibration_rows=min(IndexSpec().calibration_rows, n_rows // 2),
        expected_rows=int((1 + ADDED) * n_rows) + 1,
    )
    clusters = Clusters(n_rows, WIDTH)
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        store = Store(Path(directory))
        units = embedded(store, clusters, n_rows, min(SHARD, room // 4))
        stages = neighbourhood_stages(spec, threads=threads)
        seconds: dict[str, float] = {}

        def note(stage: str, artefact: Artefact) -> None:
            seconds[stage] = seconds.get(stage, 0.0) + artefact.made["process_s"] + artefact.made["commit_s"]

        began = time.perf_counter()
        made = carry_out(stages, {"embed": units}, store, note)
        ivf_s = time.perf_counter() - began
        by_stage, seconds = seconds, {}
        more = embedded(store, clusters, max(1, int(ADDED * n_rows)), min(SHARD, room // 4), first_shard=len(units))
        began = time.perf_counter()
        carry_out(stages, {"embed": [*units, *more]}, store, note)
        add_s = time.perf_counter() - began
        radius = Radius.read(made["radius"][0].path)
        parts = partitions(units, room)
        return {
            "rows": n_rows,
            "threads": threads,
            "n_lists": radius.n_lists,
            "n_probes": radius.n_probes,
            "joins": len(made["edges"]),
            "joins_raised": sum(bool(join.report["notes"].get("probes_raised")) for join in made["edges"]),
            "edges": sum(part.report["metrics"]["edges"] for part in made["neighbours"]),
            "edge_recall": measured_recall(made["edges"]),
            "ivf_s": ivf_s,
            "ivf_by_stage_s": by_stage,
            "add_s": add_s,
            "add_by_stage_s": seconds,
            "build_peak_bytes": _peak(),
            **_searched(made, parts, n_rows, threads),
            "peak_bytes": _peak(),
        }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _searched(made: dict[str, list[Artefact]], parts: list[Partition], n_rows: int, threads: int) -> dict[str, Any]:
    """Queries a second, by IVF one way and exactly, on one sample; HNSW beside them on few rows."""
    use_threads()
    features_ND = torch.cat([read_features(part.units) for part in parts])
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(n_rows, generator=generator)[:QUERIES]
    few = rows[:EXACT_QUERIES]
    began = time.perf_counter()
    exact = radius_graph(features_ND[few], MIN_COSINE, base_MD=features_ND, self_rows=few)
    one_way_s = (time.perf_counter() - began) / len(few)
    # In the graph of a whole pool each product serves both its rows.
    block = slice(0, min(len(features_ND) // 2, 8192))
    others = slice(block.stop, min(len(features_ND), block.stop + 65536))
    began = time.perf_counter()
    radius_graph_between(features_ND[block], features_ND[others], MIN_COSINE)
    pairs = (block.stop - block.start) * (others.stop - others.start)
    exact_s = (time.perf_counter() - began) / pairs * n_rows**2 / 2
    quantizer = read_index(made["radius"][0].file(QUANTIZER))
    centroids = torch.from_numpy(quantizer.quantizer.reconstruct_n(0, quantizer.nlist))
    n_probes = probes_needed(exact, features_ND[few], features_ND, centroids, min_recall=0.99, mutual=False)
    indexes = [read_index(artefact.file(INDEX)) for artefact in made["index"]]
    while True:
        found, search_s = _ivf(quantizer, indexes, parts, features_ND[rows].numpy(), rows.numpy(), n_probes)
        shared = edges_shared(exact, _first(found, len(few)))
        if (recall := shared / len(exact.neighbours)) >= 0.99 or n_probes >= quantizer.nlist:
            break
        n_probes = min(quantizer.nlist, 2 * n_probes)
    indexes.clear()
    files = [artefact.file(INDEX) for artefact in made["index"]]
    whole = merged(files, quantizer, [part.first_row for part in parts])
    at_once, merged_s = _ivf(whole, [whole], parts[:1], features_ND[rows].numpy(), rows.numpy(), n_probes)
    if not torch.equal(at_once.neighbours, found.neighbours):
        sys.exit("the merged index finds other edges than its parts")
    return {
        "merged_qps": len(rows) / merged_s,
        "exact_s": exact_s,
        "exact_qps": 1 / one_way_s,
        "exact_symmetric_qps": n_rows / exact_s,
        "ivf_qps": len(rows) / search_s,
        "ivf_probes": n_probes,
        "ivf_recall": recall,
        "flops": measured_flops(WIDTH, threads, CPU),
        **_others(features_ND[:HNSW_ROWS].numpy()),
    }


def _first(graph: Neighbourhoods, n_anchors: int) -> Neighbourhoods:
    stop = int(graph.offsets[n_anchors])
    return Neighbourhoods(graph.offsets[: n_anchors + 1], graph.neighbours[:stop], graph.cosine[:stop])


def _ivf(
    quantizer: Any, indexes: list[Any], parts: list[Partition], queries: Any, rows: Any, n_probes: int
) -> tuple[Neighbourhoods, float]:
    """The neighbours of the queries in all parts, and the seconds, the search for lists included."""
    began = time.perf_counter()
    probes = nearest_lists(quantizer, queries, n_probes)
    found = [
        (range_search(index, queries, MIN_COSINE, rows - part.first_row, probes), part.first_row)
        for index, part in zip(indexes, parts, strict=True)
    ]
    graph = side_by_side(found)
    return graph, time.perf_counter() - began


def _others(rows: np.ndarray[Any, np.dtype[np.float32]]) -> dict[str, Any]:
    """FAISS Flat and HNSW on the same few rows, through our range search: HNSW gets its queries by the hundred."""
    import faiss

    queries, own = rows[:1000], np.arange(min(1000, len(rows)))
    began = time.perf_counter()
    flat = range_search(build_flat(rows), queries, MIN_COSINE, own)
    flat_s = time.perf_counter() - began
    hnsw = faiss.IndexHNSWFlat(rows.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    hnsw.hnsw.efSearch = 128
    began = time.perf_counter()
    hnsw.add(rows)
    built_s, began = time.perf_counter() - began, time.perf_counter()
    found = range_search(hnsw, queries, MIN_COSINE, own)
    return {
        "small_rows": len(rows),
        "flat_qps": len(queries) / flat_s,
        "hnsw_qps": len(queries) / (time.perf_counter() - began),
        "hnsw_build_s": built_s,
        "hnsw_recall": edges_shared(flat, found) / max(len(flat.neighbours), 1),
    }


def _head(threads: int) -> str:
    import faiss

    versions = f"torch {torch.__version__}, faiss {faiss.__version__}, {threads} threads"
    return f"# IVF and increments\n\n`{' '.join(['python -m infra.bench.bench_ivf', *sys.argv[1:]])}`; {versions}.\n"


def table(points: list[dict[str, Any]]) -> list[str]:
    """Markdown rows of every size, and where the time of the largest went."""
    lines = [
        "| rows | edges | lists | probes | edge recall | exact graph | IVF graph | ratio | exact q/s (half saved) "
        "| IVF q/s in parts | merged (recall) | ratio (half saved) | 5 % more / rebuild | peak GiB |",
        "|" + "---|" * 14,
    ]
    for p in points:
        lines.append(
            f"| {p['rows']:,} | {p['edges']:,.0f} | {p['n_lists']} | {p['n_probes']} | {p['edge_recall']:.4f} "
            f"| {p['exact_s']:.1f} s | {p['ivf_s']:.1f} s | {p['exact_s'] / p['ivf_s']:.1f} "
            f"| {p['exact_qps']:,.0f} ({p['exact_symmetric_qps']:,.0f}) | {p['ivf_qps']:,.0f} "
            f"| {p['merged_qps']:,.0f} ({p['ivf_recall']:.4f}, {p['ivf_probes']} probes) "
            f"| {p['merged_qps'] / p['exact_qps']:.1f} ({p['merged_qps'] / p['exact_symmetric_qps']:.1f}) "
            f"| {p['add_s']:.1f} / {p['ivf_s']:.1f} s = {100 * p['add_s'] / p['ivf_s']:.1f} % "
            f"| {p['peak_bytes'] / 2**30:.1f} (build {p['build_peak_bytes'] / 2**30:.1f}) |"
        )
    last = points[-1]
    spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in last["ivf_by_stage_s"].items())
    added = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in last["add_by_stage_s"].items())
    return [
        *lines,
        "",
        f"Of the largest, the graph: {spent}; 5 % more: {added}. {last['joins_raised']} of {last['joins']} joins "
        f"searched more lists than the sample needed; matmul at {last['flops'] / 1e9:.0f} GFLOP/s.",
        f"On {last['small_rows']:,} rows: FAISS Flat {last['flat_qps']:,.0f} q/s; HNSW {last['hnsw_qps']:,.0f} q/s at "
        f"recall {last['hnsw_recall']:.4f}, built in {last['hnsw_build_s']:.1f} s.",
    ]


if __name__ == "__main__":
    main()
