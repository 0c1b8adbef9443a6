"""The radius graph against brute force, and radii calibrated from data. Shapes: N samples, M base rows, D width."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from bd_core import neighbourhood
from bd_core.neighbourhood import Neighbourhoods, adaptive_min_cosine, calibrate_min_cosine, radius_graph

NEAR = 1e-5  # a float32 cosine this close to the radius may fall on either side


@st.composite
def clouds(draw: st.DrawFn, min_size: int = 1) -> Tensor:
    """Unit rows [N, D]: random, with duplicates, in tight clusters, all equal, or with their opposites."""
    n, width = draw(st.integers(min_size, 24)), draw(st.integers(1, 6))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = normalize(torch.randn(n, width, dtype=dtype, generator=generator), dim=1)
    kind = draw(st.sampled_from(["random", "duplicated", "clustered", "all equal", "antipodal"]))
    if kind == "duplicated":
        rows = rows[torch.randint(n, (n,), generator=generator) // 2]
    if kind == "clustered":
        centre = rows[torch.randint(n, (n,), generator=generator) // 4]
        rows = normalize(centre + 0.01 * torch.randn(n, width, dtype=dtype, generator=generator), dim=1)
    if kind == "all equal":
        rows = rows[:1].repeat(n, 1)
    if kind == "antipodal":
        rows = torch.cat([rows[: n // 2], -rows])[:n]
    return rows


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


@given(clouds(), st.floats(-1, 1), st.integers(1, 30), st.integers(1, 30))
def test_self_graph_is_brute_force(features: Tensor, min_cosine: float, block_rows: int, columns: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbourhood, "BLOCK_COLUMNS", columns)
        graph = radius_graph(features, min_cosine, block_rows=block_rows)
    n = len(features)
    check_against_brute_force(graph, features, features, [min_cosine] * n, list(range(n)))
    assert graph.cosine.dtype == torch.float32
    assert graph.degree.tolist() == [int((graph.anchors() == i).sum()) for i in range(n)]
    assert graph.n_isolated == sum(degree == 0 for degree in graph.degree.tolist())
    assert graph.isolated_share == graph.n_isolated / n


@given(clouds(min_size=2), st.integers(0, 2**32), st.integers(1, 30))
def test_queries_against_a_base_with_a_radius_each(base: Tensor, seed: int, block_rows: int) -> None:
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


def test_a_shard_against_the_whole_is_its_part_of_the_self_graph() -> None:
    features = normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    whole = radius_graph(features, 0.2)
    part = radius_graph(features[10:20], 0.2, base_MD=features, self_rows=torch.arange(10, 20))
    start, stop = whole.offsets[10], whole.offsets[20]
    assert torch.equal(part.neighbours, whole.neighbours[start:stop])
    assert torch.equal(part.offsets, whole.offsets[10:21] - start)


# Every product of these rows is exact in float32, in any order of summation.
EXACT = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, -0.5, -0.5], [-1.0, 0, 0, 0], [1.0, 0, 0, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_radius_is_inclusive(dtype: torch.dtype) -> None:
    graph = radius_graph(EXACT.to(dtype), 0.5)
    assert graph.anchors().tolist() == [0, 0, 0, 1, 1, 2, 2, 4, 4, 4]
    assert graph.neighbours.tolist() == [1, 2, 4, 0, 4, 0, 4, 0, 1, 2]
    assert graph.degree.tolist() == [3, 2, 2, 0, 3]
    beyond = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0)).item()
    assert radius_graph(EXACT.to(dtype), beyond).neighbours.tolist() == [4, 0]


def test_the_whole_range_of_radii() -> None:
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


@given(clouds(min_size=2), st.integers(1, 30), st.integers(1, 30), st.data())
def test_adaptive_radius_gives_the_target_degree(
    features: Tensor, block_rows: int, columns: int, data: st.DataObject
) -> None:
    target = data.draw(st.integers(1, len(features) - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbourhood, "BLOCK_COLUMNS", columns)
        radius = adaptive_min_cosine(features, target, block_rows=block_rows)
    assert radius.dtype == torch.float32
    for i, row in enumerate((features.double() @ features.double().T).tolist()):
        others = sorted(row[:i] + row[i + 1 :], reverse=True)
        assert radius[i].item() == pytest.approx(others[target - 1], abs=NEAR)
    degree = radius_graph(features, radius).degree
    # Only antipodal pairs of cosine -1.0000001 cannot be kept by any radius in [-1, 1].
    assert (degree >= target).all() or radius.min() == -1


def test_adaptive_radius_against_a_base() -> None:
    generator = torch.Generator().manual_seed(0)
    base = normalize(torch.randn(50, 16, generator=generator), dim=1)
    own = torch.tensor([3, 40, -1])
    radius = adaptive_min_cosine(base[[3, 40, 7]], 4, base, self_rows=own)
    graph = radius_graph(base[[3, 40, 7]], radius, base_MD=base, self_rows=own)
    assert graph.degree.tolist() == [4, 4, 4]
    assert 7 in graph.neighbours[graph.offsets[2] :].tolist()


@given(clouds(min_size=2), st.sampled_from([0.0, 0.1, 0.5]), st.integers(1, 40), st.integers(0, 2**32))
def test_calibrated_radius_covers_the_sample(features: Tensor, max_isolated: float, sample: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    radius = calibrate_min_cosine(features, max_isolated=max_isolated, sample=sample, generator=generator)
    n = len(features)
    drawn = torch.arange(n)
    if sample < n:
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:sample]
    nearest = [
        max(float(features[i].double() @ features[j].double()) for j in range(n) if j != i) for i in drawn.tolist()
    ]
    assert radius == pytest.approx(sorted(nearest)[int(max_isolated * len(drawn))], abs=NEAR)
    degree = radius_graph(features, radius).degree[drawn]
    assert (degree == 0).double().mean() <= max_isolated or radius == -1


def test_calibration_repeats_with_its_generator() -> None:
    features = normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    first, second, other = (
        calibrate_min_cosine(features, max_isolated=0.1, sample=20, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first == second != other


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
        (lambda: inspect.unwrap(radius_graph)(features, 0.5, base_MD=torch.eye(3)), "queries are 4 wide, base 3"),
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
