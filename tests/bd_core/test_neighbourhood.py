"""The radius graph against brute force, and radii chosen from data. Shapes: N samples, M base rows, D width.

Everything holds for the compiled kernel, where this installation has one, and for torch.
"""

import inspect
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from graph_cases import CLOSE, ENGINES, NEAR, by_the_rule, clouds, cluster_rows, joined, running, same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from bd_core.neighbourhood import (
    Neighbourhoods,
    adaptive_min_cosine,
    calibrate_min_cosine,
    exact_cosine,
    radius_graph,
    radius_graph_between,
    radius_graph_parts,
    rounding_bound,
)


@pytest.fixture(params=["kernel", "torch"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    with running(request.param):
        yield request.param


def check_against_brute_force(
    graph: Neighbourhoods, query: Tensor, base: Tensor, radius: list[float], own: list[int]
) -> None:
    """Every pair by itself in float64; only pairs within NEAR of the radius may be decided either way."""
    assert graph.offsets.tolist()[0] == 0 and len(graph.offsets) == len(query) + 1
    for i in range(len(query)):
        start, stop = graph.offsets[i : i + 2].tolist()
        found = dict(zip(graph.neighbours[start:stop].tolist(), graph.cosine[start:stop].tolist(), strict=True))
        assert list(found) == sorted(found)
        for j in range(len(base)):
            cosine = float(query[i].double() @ base[j].double())
            if j in found:
                assert found[j] == pytest.approx(cosine, abs=NEAR)
            if j == own[i] or cosine < radius[i] - NEAR:
                assert j not in found
            elif cosine >= radius[i] + NEAR:
                assert j in found


@given(clouds(), st.floats(-1, 1), st.integers(1, 30), ENGINES, st.booleans())
def test_self_graph_is_brute_force(
    features: Tensor, min_cosine: float, block_rows: int, engine: str, mirror: bool
) -> None:
    with running(engine):
        graph = joined(radius_graph_parts(features, min_cosine, block_rows=block_rows, mirror=mirror))
    n = len(features)
    check_against_brute_force(graph, features, features, [min_cosine] * n, list(range(n)))
    assert graph.cosine.dtype == torch.float32
    assert graph.degree.tolist() == [int((graph.anchors() == i).sum()) for i in range(n)]
    assert graph.n_isolated == sum(degree == 0 for degree in graph.degree.tolist())
    assert graph.isolated_share == graph.n_isolated / n


@given(clouds(min_size=2), st.integers(0, 2**32), st.integers(1, 30), ENGINES)
def test_queries_against_a_base_with_a_radius_each(base: Tensor, seed: int, block_rows: int, engine: str) -> None:
    with running(engine):
        check_queries_against_a_base(base, seed, block_rows)


def check_queries_against_a_base(base: Tensor, seed: int, block_rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(len(base), (5,), generator=generator)
    radius = torch.rand(5, generator=generator) * 2 - 1
    graph = radius_graph(base[own], radius, base_MD=base, self_rows=own, block_rows=block_rows)
    check_against_brute_force(graph, base[own], base, radius.tolist(), own.tolist())
    unknown = radius_graph(base[own], radius, base_MD=base, block_rows=block_rows)
    check_against_brute_force(unknown, base[own], base, radius.tolist(), [-1] * 5)
    own[2] = -1
    mixed = radius_graph(base[own], radius, base_MD=base, self_rows=own, block_rows=block_rows)
    check_against_brute_force(mixed, base[own], base, radius.tolist(), own.tolist())


# More rows than a block and a chunk of the kernel, wider than its depth, and neither a multiple of its tiles.
@pytest.mark.parametrize(("n", "width", "radius"), [(1301, 300, 0.6), (4999, 13, 0.9), (700, 17, 0.1)])
def test_large_self_graphs_follow_the_rule(engine: str, n: int, width: int, radius: float) -> None:
    features = cluster_rows(n, width)
    expected = by_the_rule(features, features, radius, first_own=0)
    for parts in (
        radius_graph_parts(features, radius),
        radius_graph_parts(features, radius, block_rows=517),
        radius_graph_parts(features, radius, mirror=False),
    ):
        same(joined(parts), expected, 1e-6)


def test_one_radius_for_each_end(engine: str) -> None:
    features = cluster_rows(1100, 40)
    radius = 0.4 + 0.5 * torch.rand(1100, generator=torch.Generator().manual_seed(1))
    same(radius_graph(features, radius, block_rows=300), by_the_rule(features, features, radius, first_own=0), 1e-6)


def test_both_ends_have_one_cosine(engine: str) -> None:
    features = cluster_rows(1500, 96)
    graph = radius_graph(features, 0.6, block_rows=400)
    order = (graph.neighbours * len(features) + graph.anchors()).argsort()
    assert torch.equal(graph.neighbours[order], graph.anchors())
    assert torch.equal(graph.cosine[order], graph.cosine)


@pytest.mark.parametrize("adaptive", [False, True])
def test_partitions_make_up_the_whole(engine: str, adaptive: bool) -> None:
    """Each partition by itself and each two together once: what a graph that grows by shards is made of."""
    features = cluster_rows(1400, 64)
    radius = adaptive_min_cosine(features, 12) if adaptive else torch.tensor(0.6)
    whole = radius_graph(features, radius if adaptive else 0.6)
    bounds = [0, 300, 301, 900, 1400]
    rows = [slice(a, b) for a, b in pairwise(bounds)]
    radii = [radius[r] if adaptive else 0.6 for r in rows]
    found: dict[tuple[int, int], Neighbourhoods] = {}
    for i in range(4):
        found[i, i] = radius_graph(features[rows[i]], radii[i])
        for j in range(i + 1, 4):
            found[i, j], found[j, i] = radius_graph_between(
                features[rows[i]], features[rows[j]], radii[i], radii[j], block_rows=170
            )
    edges = {
        (a + rows[i].start, b + rows[j].start): c
        for (i, j), part in found.items()
        for a, b, c in zip(part.anchors().tolist(), part.neighbours.tolist(), part.cosine.tolist(), strict=True)
    }
    pairs = zip(whole.anchors().tolist(), whole.neighbours.tolist(), strict=True)
    expected = dict(zip(pairs, whole.cosine.tolist(), strict=True))
    assert edges.keys() == expected.keys()
    assert max(abs(edges[pair] - cosine) for pair, cosine in expected.items()) <= CLOSE[engine]


def test_a_shard_against_the_whole_is_its_part_of_the_self_graph(engine: str) -> None:
    features = cluster_rows(1300, 80)
    whole = radius_graph(features, 0.6)
    part = radius_graph(features[10:620], 0.6, base_MD=features, self_rows=torch.arange(10, 620))
    start, stop = whole.offsets[10], whole.offsets[620]
    expected = Neighbourhoods(whole.offsets[10:621] - start, whole.neighbours[start:stop], whole.cosine[start:stop])
    same(part, expected, CLOSE[engine])


def test_kernel_threads_and_torch_find_the_same() -> None:
    features = cluster_rows(1200, 130)
    graph = radius_graph(features, 0.6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads < 3 else 1)
        same(radius_graph(features, 0.6), graph)
    finally:
        torch.set_num_threads(threads)
    with running("torch"):
        same(radius_graph(features, 0.6), graph, 1e-6)


def test_a_coarse_product_finds_the_same_edges() -> None:
    """The path of a GPU: bfloat16 picks candidates with its bound, float64 decides."""
    features = cluster_rows(900, 64)
    for radius in (0.5, 0.62, 1.0):
        same(radius_graph(features, radius, product=torch.bfloat16), by_the_rule(features, features, radius, 0))
    there, back = radius_graph_between(features[:200], features[200:], 0.6, product=torch.bfloat16)
    same(there, by_the_rule(features[:200], features[200:], 0.6))
    same(back, by_the_rule(features[200:], features[:200], 0.6))
    with running("torch"):
        precision = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")  # float32 products may now be less than that
            same(radius_graph(features, 0.6), by_the_rule(features, features, 0.6, 0))
        finally:
            torch.set_float32_matmul_precision(precision)
    with pytest.raises(ValueError, match="no bound is known for products in"):
        radius_graph(features, 0.6, product=torch.float16)


@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16])
def test_products_are_within_their_bound(product: torch.dtype) -> None:
    features = cluster_rows(300, 200)
    found = (features.to(product) @ features.to(product).T).double()
    error = (found - features.double() @ features.double().T).abs().max().item()
    assert error < rounding_bound(200, product)


def test_adversarial_sets(engine: str) -> None:
    """Duplicates on the radius, a hub, opposite halves: whatever a float32 product comes out as."""
    row = normalize(torch.randn(1, 200, generator=torch.Generator().manual_seed(0)), dim=1)
    equal = row.repeat(300, 1)
    on_the_radius = float((row[0].double() @ row[0].double()).float())
    for radius, degree in ((-1.0, 299), (0.9, 299), (on_the_radius, 299), (on_the_radius + 1e-7, 0)):
        if radius <= 1:
            assert radius_graph(equal, radius).degree.unique().tolist() == [degree]
    assert adaptive_min_cosine(equal, 5).sub(1).abs().max() < 1e-5
    opposite = torch.cat([equal, -equal])
    graph = radius_graph(opposite, 0.5)
    assert graph.degree.unique().tolist() == [299] and (graph.cosine > 0.5).all()
    hub = torch.cat([torch.eye(256)[:1], normalize(torch.eye(256)[1:] + torch.eye(256)[:1], dim=1)])
    same(radius_graph(hub, 0.6), by_the_rule(hub, hub, 0.6, 0), 1e-6)
    assert radius_graph(hub, 0.6).degree.tolist() == [255] + [1] * 255


def test_exact_cosine_decides_between_back_ends() -> None:
    features = cluster_rows(400, 50)
    graph = by_the_rule(features, features, 0.5, 0)
    assert torch.equal(exact_cosine(features, features, graph.anchors(), graph.neighbours), graph.cosine)


# Every product of these rows is exact in float32, in any order of summation.
EXACT = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, -0.5, -0.5], [-1.0, 0, 0, 0], [1.0, 0, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_radius_is_inclusive(dtype: torch.dtype, engine: str) -> None:
    graph = radius_graph(EXACT.to(dtype), 0.5)
    assert graph.anchors().tolist() == [0, 0, 0, 1, 1, 2, 2, 4, 4, 4]
    assert graph.neighbours.tolist() == [1, 2, 4, 0, 4, 0, 4, 0, 1, 2]
    assert graph.degree.tolist() == [3, 2, 2, 0, 3]
    beyond = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    assert radius_graph(EXACT.to(dtype), beyond).neighbours.tolist() == [4, 0]


def test_the_whole_range_of_radii(engine: str) -> None:
    assert radius_graph(EXACT, 1.0).neighbours.tolist() == [4, 0]  # a duplicate is a neighbour, a sample itself is not
    assert radius_graph(EXACT, -1.0).degree.tolist() == [4] * 5
    assert radius_graph(EXACT[:1], -1.0).n_isolated == 1


def test_samples_may_be_reordered() -> None:
    generator = torch.Generator().manual_seed(2)
    features = normalize(torch.randn(30, 5, generator=generator), dim=1)
    order = torch.randperm(30, generator=generator)
    graph, mixed = radius_graph(features, 0.3), radius_graph(features[order], 0.3)
    edges = set(zip(graph.anchors().tolist(), graph.neighbours.tolist(), strict=True))
    assert edges == set(zip(order[mixed.anchors()].tolist(), order[mixed.neighbours].tolist(), strict=True))
    assert edges == {(other, anchor) for anchor, other in edges}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([torch.nan, 0.0], "row 1 has nan or inf .*drop broken rows"),
        ([torch.inf, 0.0], "row 1 has nan or inf"),
        ([0.0, 0.0], "row 1 has a length other than 1"),
        ([1.002, 0.0], r"row 1 has a length other than 1 \(norm 1.002; 1 of 2 rows"),
    ],
)
def test_bad_features_are_named(row: list[float], message: str) -> None:
    features = torch.tensor([[1.0, 0.0], row])
    with pytest.raises(ValueError, match=f"radius_graph, queries: {message}"):
        radius_graph(features, 0.5)
    with pytest.raises(ValueError, match=f"radius_graph, base: {message}"):
        radius_graph(features[:1], 0.5, base_MD=features)
    with pytest.raises(ValueError, match=message):
        adaptive_min_cosine(features, 1)
    with pytest.raises(ValueError, match=message):
        calibrate_min_cosine(features, max_isolated=0.0, sample=9, generator=torch.Generator())


def test_bad_arguments_are_named() -> None:
    features, generator = EXACT, torch.Generator()
    radius_graph(features * 1.0009, 0.5)  # within the tolerance
    for call, message in (
        (lambda: radius_graph(features[:0], 0.5), r"shape \(0, 4\)"),
        (lambda: radius_graph(features, 1.5), "min_cosine = 1.5"),
        (lambda: radius_graph(features, float("nan")), "min_cosine = nan"),
        (lambda: radius_graph(features, 0.5, block_rows=0), "block_rows = 0"),
        (lambda: inspect.unwrap(radius_graph_parts)(features, 0.5, base_MD=torch.eye(3)), "queries are 4 wide, base 3"),
        (lambda: radius_graph(features, 0.5, self_rows=torch.arange(5)), "self_rows without a base"),
        (
            lambda: radius_graph(features, 0.5, base_MD=features, self_rows=torch.arange(5) + 1),
            "needs one row of the base",
        ),
        (
            lambda: radius_graph(features, 0.5, base_MD=features, self_rows=torch.arange(5) - 2),
            "needs one row of the base",
        ),
        (lambda: adaptive_min_cosine(features, 5), "5 neighbours asked for, 4 other rows"),
        (lambda: adaptive_min_cosine(features, 0), "0 neighbours asked for"),
        (lambda: calibrate_min_cosine(features, max_isolated=1.0, sample=2, generator=generator), "max_isolated = 1.0"),
        (lambda: calibrate_min_cosine(features, max_isolated=0.1, sample=0, generator=generator), "sample = 0 of 5"),
        (lambda: calibrate_min_cosine(features[:1], max_isolated=0.1, sample=1, generator=generator), "of 1 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("offsets", "neighbours", "message"),
    [
        ([0, 1], [], "start at 0"),
        ([1, 2], [0, 1], "start at 0"),
        ([0, 2, 1, 3], [0, 1, 2], "never fall"),
        ([0], [], "A \\+ 1 >= 2"),
        ([0, 2, 3], [2, 1, 0], r"neighbours\[1\] = 1 of anchor 0"),
        ([0, 1, 3], [5, 1, 1], r"neighbours\[2\] = 1 of anchor 1"),
        ([0, 1, 2], [3, -1], r"neighbours\[1\] = -1 of anchor 1"),
    ],
)
def test_a_broken_graph_is_refused(offsets: list[int], neighbours: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Neighbourhoods(torch.tensor(offsets), torch.tensor(neighbours, dtype=torch.int64), torch.zeros(len(neighbours)))
    with pytest.raises(ValueError, match="one finite cosine an edge"):
        Neighbourhoods(torch.tensor([0, 1]), torch.tensor([3]), torch.tensor([torch.nan]))
