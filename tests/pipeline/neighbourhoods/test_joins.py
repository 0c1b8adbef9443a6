"""Every back end finds the edges of brute force, on easy sets and on those made to break one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pooled import Edges, by_brute_force, clustered, edges_of

from bd_core.neighbourhood import adaptive_min_cosine, radius_graph
from pipeline.formats.faiss_gpu import completed
from pipeline.formats.faiss_index import build_flat, range_search
from pipeline.formats.faiss_ivf import add_part, nearest_lists, train
from pipeline.neighbourhoods.csr import edges_shared, nearest, side_by_side, transposed, union, within_adaptive_radius
from pipeline.neighbourhoods.joins import Side, join
from pipeline.neighbourhoods.probes import measured_flops, probes_needed
from pipeline.neighbourhoods.radius import Radius

CPU, LISTS, WIDTH = torch.device("cpu"), 16, 16
Rows = np.ndarray[Any, np.dtype[np.float32]]


def unit(rows: Any) -> Rows:
    given = np.asarray(rows, dtype=np.float64)
    made: Rows = (given / np.linalg.norm(given, axis=1, keepdims=True)).astype(np.float32)
    return made


def duplicated() -> Rows:
    return np.repeat(clustered(40), 3, axis=0)


def all_equal() -> Rows:
    return np.repeat(clustered(1), 60, axis=0)


def antipodal() -> Rows:
    rows = clustered(30)
    return np.concatenate([rows, -rows])


def one_hub() -> Rows:
    """A row that is near all others, none of which are near each other."""
    axes = np.eye(WIDTH)
    return unit(np.concatenate([axes.sum(0, keepdims=True), axes, -axes + 1.2 * axes.mean(0)]))


def on_the_radius() -> Rows:
    """Products of 0.5 exactly, in float32 and in any order of summing."""
    axes = np.eye(WIDTH)
    return np.concatenate([axes, [(axes[0] + axes[k] + axes[k + 1] + axes[k + 2]) / 2 for k in (1, 4, 7)]]).astype("f4")


SETS = {
    "clustered": (clustered(150), 0.6),
    "duplicated": (duplicated(), 0.7),
    "all equal": (all_equal(), 0.99),
    "antipodal": (antipodal(), -1.0),
    "one hub": (one_hub(), 0.2),
    "on the radius": (on_the_radius(), 0.5),
    "isolated": (unit(np.eye(WIDTH)), 0.5),
}


def side(rows: Rows, index: Any = None) -> Side:
    if index is None:
        return Side(torch.from_numpy(rows))
    probes = nearest_lists(index, rows, LISTS)
    return Side(torch.from_numpy(rows), add_part(index, rows, probes), probes)


def joined(rows: Rows, radius: Radius, cut: int) -> tuple[Edges, list[Any]]:
    """The edges of the whole set from the three joins of its two parts, and the joins."""
    sides = []
    for part in (rows[:cut], rows[cut:]):
        trained = train(rows, min(LISTS, len(rows)), 0) if radius.backend == "ivf" else None
        sides.append(side(part, trained))
    first, second = sides
    both = [join(first, None, radius, CPU), join(first, second, radius, CPU), join(second, None, radius, CPU)]
    assert both[0].backward is None and both[1].backward is not None
    graphs = [
        side_by_side([(both[0].forward, 0), (both[1].forward, cut)]),
        side_by_side([(both[1].backward, 0), (both[2].forward, cut)]),
    ]
    if radius.mode == "adaptive":
        graphs = [within_adaptive_radius(graph, radius.target_degree) for graph in graphs]
    return edges_of(graphs[0]) | edges_of(graphs[1], cut), both


@pytest.mark.parametrize("backend", ["exact", "flat", "ivf"])
@pytest.mark.parametrize("name", SETS)
def test_the_joins_of_two_parts_have_the_edges_of_brute_force(name: str, backend: Any) -> None:
    rows, min_cosine = SETS[name]
    radius = Radius("global", min_cosine, 4, backend, LISTS, LISTS)
    found, both = joined(rows, radius, len(rows) // 3)
    assert found == by_brute_force(rows, min_cosine)
    back = transposed(both[1].forward, len(rows) - len(rows) // 3)
    assert torch.equal(back.neighbours, both[1].backward.neighbours)
    assert torch.equal(back.offsets, both[1].backward.offsets)


@pytest.mark.parametrize("backend", ["exact", "flat", "ivf"])
def test_an_adaptive_radius_is_that_of_the_whole_pool_on_every_back_end(backend: Any) -> None:
    rows = clustered(160, seed=3)
    whole = torch.from_numpy(rows)
    wanted = edges_of(radius_graph(whole, adaptive_min_cosine(whole, 5)))
    found, _ = joined(rows, Radius("adaptive", 0.5, 5, backend, LISTS, LISTS), 50)
    assert found == wanted


def test_few_lists_lose_edges_and_looking_from_both_ends_finds_most_of_them_again() -> None:
    rows = clustered(600, seed=1)
    whole = torch.from_numpy(rows)
    exact = radius_graph(whole, 0.6)
    index = train(rows, LISTS, 0)
    made = side(rows, index)
    assert made.probes is not None
    one_way = range_search(index, rows, 0.6, np.arange(600), np.ascontiguousarray(made.probes[:, :1]))
    both_ways = join(made, None, Radius("global", 0.6, 4, "ivf", LISTS, 2), CPU).forward
    two = range_search(index, rows, 0.6, np.arange(600), np.ascontiguousarray(made.probes[:, :2]))
    assert edges_shared(exact, one_way) < edges_shared(exact, two) < edges_shared(exact, both_ways)
    assert edges_of(both_ways) == {(b, a) for a, b in edges_of(both_ways)}
    assert edges_of(both_ways) == edges_of(union(two, transposed(two, 600)))


@pytest.mark.parametrize("mutual", [False, True])
def test_the_lists_needed_are_the_fewest_that_reach_the_recall(mutual: bool) -> None:
    rows = clustered(800, seed=2)
    whole = torch.from_numpy(rows)
    index = train(rows, 64, 0)
    centroids = torch.from_numpy(index.quantizer.reconstruct_n(0, 64))
    probes = nearest_lists(index, rows, 64)
    add_part(index, rows, probes)
    exact = radius_graph(whole, 0.55)
    needed = probes_needed(exact, whole, whole, centroids, min_recall=0.98, mutual=mutual)

    def recall(n_probes: int) -> float:
        found = range_search(index, rows, 0.55, np.arange(800), np.ascontiguousarray(probes[:, :n_probes]))
        if mutual:
            found = union(found, transposed(found, 800))
        return edges_shared(exact, found) / len(exact.neighbours)

    assert recall(needed) >= 0.98 and 1 < needed < 64
    assert recall(needed // 2) < 0.985  # the bar, with the margin kept for what a sample does not show


def test_a_pool_without_edges_needs_one_list() -> None:
    whole = torch.eye(8)
    assert probes_needed(radius_graph(whole, 0.5), whole, whole, whole, min_recall=0.99, mutual=True) == 1


def test_k_nearest_neighbours_are_completed_where_they_do_not_reach_the_radius() -> None:
    rows = clustered(120, seed=5)
    index = build_flat(rows)
    for k in (1, 3, 40, 120):
        found = completed(index, index, rows, 0.6, np.arange(120), k)
        assert edges_of(found) == by_brute_force(rows, 0.6), k


def test_a_degree_cap_keeps_the_nearest() -> None:
    whole = torch.from_numpy(clustered(80))
    graph = radius_graph(whole, 0.2)
    capped = nearest(graph, 3)
    assert capped.degree.tolist() == graph.degree.clamp(max=3).tolist()
    for anchor in range(80):
        here = slice(int(graph.offsets[anchor]), int(graph.offsets[anchor + 1]))
        best = graph.cosine[here].sort(descending=True).values[:3]
        kept = capped.cosine[int(capped.offsets[anchor]) : int(capped.offsets[anchor + 1])]
        assert torch.equal(kept.sort(descending=True).values, best)


def test_the_rate_of_arithmetic_is_measured_and_threads_are_left_as_they_were(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    assert 1e8 < measured_flops(64, 1, CPU, rounds=1) < 1e14
    assert torch.get_num_threads() == before
