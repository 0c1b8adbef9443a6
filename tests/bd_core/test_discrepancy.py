"""Sharpness, divergence, conflict, ADS and the split against loops over the definitions. Shapes: N, C, A, E."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bd_core import edge_distance
from bd_core.discrepancy import (
    FACTORS,
    adjacency_discrepancy,
    conflict,
    discrepancy,
    divergence,
    evidence,
    negative_sharpness_share,
    positive_quantile,
    sharpness,
    split_pairs,
)
from bd_core.neighbourhood import Neighbourhoods


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Tensor, Neighbourhoods, Tensor | None]:
    """alpha [N, C], a random graph with isolated anchors, and alpha of other anchors, or None for rows 0 to A - 1."""
    n, classes = draw(st.integers(2, 9)), draw(st.integers(2, 6))
    n_anchors = draw(st.integers(1, n))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.0, 0.5, 3.0]))

    def alpha(rows: int) -> Tensor:
        return 1 + (torch.randn(rows, classes, dtype=dtype, generator=generator) * spread).exp()

    density = draw(st.sampled_from([0.0, 0.3, 1.0]))
    linked = torch.rand(n_anchors, n, generator=generator) < density
    linked.fill_diagonal_(False)
    linked[0] &= draw(st.booleans())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), linked.sum(1).cumsum(0)])
    neighbours = linked.nonzero()[:, 1]
    graph = Neighbourhoods(offsets, neighbours, torch.zeros(len(neighbours)))
    return alpha(n), graph, alpha(n_anchors) if draw(st.booleans()) else None


class Slow:
    """The printed formulas, one anchor, one neighbour and one class at a time."""

    def __init__(self, alpha: Tensor, graph: Neighbourhoods, anchor_alpha: Tensor | None) -> None:
        self.base = alpha.tolist()
        self.anchors = self.base if anchor_alpha is None else anchor_alpha.tolist()
        self.classes = alpha.shape[1]
        bounds = graph.offsets.tolist()
        self.near = [graph.neighbours.tolist()[a:b] for a, b in pairwise(bounds)]

    def gap(self, i: int, j: int) -> float:
        first, second = self.anchors[i], self.base[j]
        return sum(abs(first[c] / sum(first) - second[c] / sum(second)) for c in range(self.classes))

    def sharp(self, i: int, form: str = "paper") -> float:
        if not self.near[i]:
            return math.nan
        mean = sum(math.log(sum(self.base[j]) / max(self.base[j]) - 1) for j in self.near[i]) / len(self.near[i])
        return mean if form == "paper" else math.log1p(math.exp(mean))

    def div(self, i: int) -> float:
        return sum(self.gap(i, j) for j in self.near[i]) / len(self.near[i]) if self.near[i] else math.nan

    def conf(self, i: int, k: int) -> float:
        u_i, u_k = self.classes / sum(self.anchors[i]), self.classes / sum(self.base[k])
        return self.gap(i, k) * (1 - u_i) * (1 - u_k)

    def edges(self) -> list[tuple[int, int]]:
        return [(i, k) for i in range(len(self.near)) for k in self.near[i]]


@contextmanager
def running(engine: str) -> Iterator[None]:
    """The compiled kernel if there is one, or torch."""
    with pytest.MonkeyPatch.context() as patch:
        if engine == "torch":
            patch.setattr(edge_distance, "kernel_runs", lambda *tensors: False)
        yield


def least_budget(alpha: Tensor, graph: Neighbourhoods) -> int:
    """What the refusal of a budget of one byte says would do."""
    with pytest.raises(ValueError, match="does not hold the largest neighbourhood") as refused:
        discrepancy(alpha, graph, anchor_alpha=alpha[:1].expand(graph.n_anchors, -1), budget_bytes=1)
    return int(str(refused.value).split("at least ")[1].split(",")[0])


def random_graph(n: int, degree: int, seed: int = 0) -> Neighbourhoods:
    """n anchors with up to `degree` neighbours among n rows, one with all of them, every tenth with none."""
    generator = torch.Generator().manual_seed(seed)
    linked = torch.rand(n, n, generator=generator) < degree / n
    linked[3], linked[::10] = True, False
    linked.fill_diagonal_(False)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), linked.sum(1).cumsum(0)])
    neighbours = linked.nonzero()[:, 1]
    return Neighbourhoods(offsets, neighbours, torch.zeros(len(neighbours)))


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), equal_nan=True, rtol=2e-5, atol=2e-6)


@given(graphs(), st.sampled_from(["paper", "positive"]))
def test_sharpness_is_the_definition(case: tuple[Tensor, Neighbourhoods, Tensor | None], form: str) -> None:
    alpha, graph, _ = case
    slow = Slow(alpha, graph, None)
    found = sharpness(alpha, graph, form)  # type: ignore[arg-type]
    close(found, [slow.sharp(i, form) for i in range(graph.n_anchors)])
    if form == "positive":
        assert (found[~found.isnan()] >= 0).all()


@given(graphs())
def test_divergence_is_the_definition(case: tuple[Tensor, Neighbourhoods, Tensor | None]) -> None:
    slow, graph = Slow(*case), case[1]
    found = divergence(*case)
    close(found, [slow.div(i) for i in range(graph.n_anchors)])
    assert torch.equal(found.isnan(), graph.degree == 0)
    assert (found.nan_to_num(0) <= 2 + 1e-5).all() and (found.nan_to_num(0) >= 0).all()


@given(graphs())
def test_conflict_is_the_definition(case: tuple[Tensor, Neighbourhoods, Tensor | None]) -> None:
    slow = Slow(*case)
    found = conflict(*case)
    close(found, [slow.conf(i, k) for i, k in slow.edges()])
    assert found.dtype == case[0].dtype


@given(
    graphs(),
    st.sampled_from(["paper", "positive"]),
    st.sets(st.sampled_from(FACTORS), min_size=1),
    st.integers(0, 2000),
    st.sampled_from(["kernel", "torch"]),
)
def test_ads_is_the_definition(
    case: tuple[Tensor, Neighbourhoods, Tensor | None], form: str, factors: set[str], more: int, engine: str
) -> None:
    """d_ik = Sharp(x_i) Div(x_i) Conf(x_i, x_k), with any of the factors left out, in blocks of any size."""
    alpha, graph, anchor_alpha = case
    slow = Slow(*case)
    with running(engine):
        least = least_budget(alpha, graph)
        found = adjacency_discrepancy(alpha, graph, form, anchor_alpha, tuple(factors), least + more)  # type: ignore[arg-type]
    expected = []
    for i, k in slow.edges():
        value = slow.sharp(i, form) if "sharpness" in factors else 1.0
        value *= slow.div(i) if "divergence" in factors else 1.0
        expected.append(value * slow.conf(i, k) if "conflict" in factors else value)
    close(found, expected)
    assert len(found) == len(graph.neighbours)


@pytest.mark.parametrize("engine", ["kernel", "torch"])
@pytest.mark.parametrize(("n", "classes", "degree"), [(300, 758, 20), (40, 10_000, 6), (200, 31, 9), (50, 2, 49)])
def test_many_classes_and_every_part_of_it(engine: str, n: int, classes: int, degree: int) -> None:
    """Against float64 with every row gathered at once; rows longer than the kernel's steps, a hub and isolated rows."""
    alpha = 1 + (torch.randn(n, classes, generator=torch.Generator().manual_seed(1)) * 2).exp()
    graph = random_graph(n, degree)
    p, anchor, other = (alpha / alpha.sum(1, keepdim=True)).double(), graph.anchors(), graph.neighbours
    distance = (p[anchor] - p[other]).abs().sum(1)
    certainty = 1 - classes / alpha.double().sum(1)

    def mean(values: Tensor) -> Tensor:
        return torch.zeros(n, dtype=torch.float64).index_add_(0, anchor, values) / graph.degree

    top = alpha.double().max(1).values
    sharp, div = mean((alpha.double().sum(1) / top - 1).log()[other]), mean(distance)
    ads = sharp[anchor] * div[anchor] * distance * certainty[anchor] * certainty[other]
    with running(engine):
        found = discrepancy(alpha, graph, budget_bytes=least_budget(alpha, graph))
        again = discrepancy(evidence(alpha), graph, anchor_alpha=evidence(alpha).rows(slice(0, n)))
    for name, expected in (("ads", ads), ("sharpness", sharp), ("divergence", div), ("mean_ads", mean(ads))):
        value = getattr(found, name)
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=1e-6, equal_nan=True)
        assert torch.equal(value.nan_to_num(), getattr(again, name).nan_to_num())
        assert value.dtype == torch.float32


def test_kernel_and_torch_agree() -> None:
    alpha, graph = 1 + torch.rand(200, 123, generator=torch.Generator().manual_seed(0)) * 9, random_graph(200, 12)
    found = discrepancy(alpha, graph)
    with running("torch"):
        torch.testing.assert_close(discrepancy(alpha, graph).ads, found.ads, rtol=1e-6, atol=1e-7)
    strided = torch.cat([alpha, alpha], dim=1)[:, :123]  # no kernel reads it, whatever the anchors are
    torch.testing.assert_close(discrepancy(strided, graph, "paper", alpha).ads, found.ads, rtol=1e-6, atol=1e-7)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if threads < 3 else 1)
        assert torch.equal(discrepancy(alpha, graph).ads, found.ads)
    finally:
        torch.set_num_threads(threads)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation wrote."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and func._schema.returns[0].alias_info is None:  # no view
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return made


@pytest.mark.parametrize("engine", ["kernel", "torch"])
def test_no_tensor_is_larger_than_the_budget(engine: str) -> None:
    alpha, graph = 1 + torch.rand(400, 50, generator=torch.Generator().manual_seed(0)), random_graph(400, 40)
    known, budget = evidence(alpha), 60_000
    with running(engine), Largest() as largest:
        adjacency_discrepancy(known, graph, budget_bytes=budget)
    results = 4 * len(graph.neighbours)
    assert largest.bytes <= max(budget, results) and results < budget * 3
    assert len(graph.neighbours) * 50 * 4 > 20 * budget  # E x C, which is never made


@given(graphs(), st.randoms(use_true_random=False))
def test_classes_may_be_reordered(case: tuple[Tensor, Neighbourhoods, Tensor | None], random: "random.Random") -> None:
    alpha, graph, anchor_alpha = case
    order = list(range(alpha.shape[1]))
    random.shuffle(order)
    mixed = adjacency_discrepancy(
        alpha[:, order], graph, "paper", None if anchor_alpha is None else anchor_alpha[:, order]
    )
    torch.testing.assert_close(mixed, adjacency_discrepancy(alpha, graph, "paper", anchor_alpha), rtol=1e-4, atol=1e-6)


def test_anchors_of_a_shard_get_what_they_get_in_the_whole() -> None:
    alpha = 1 + torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) * 9
    neighbours = torch.tensor([1, 2, 0, 3, 4, 5, 0, 2])
    whole = Neighbourhoods(torch.tensor([0, 2, 3, 3, 5, 6, 8]), neighbours, torch.zeros(8))
    part = Neighbourhoods(torch.tensor([0, 0, 2, 3]), neighbours[3:6], torch.zeros(3))  # anchors 2, 3, 4
    found = adjacency_discrepancy(alpha, part, anchor_alpha=alpha[2:5])
    assert torch.equal(found, adjacency_discrepancy(alpha, whole)[3:6])


def test_equal_neighbours_have_no_discrepancy() -> None:
    alpha = torch.tensor([[5.0, 2, 1]]).repeat(3, 1)
    graph = Neighbourhoods(torch.tensor([0, 2, 3, 3]), torch.tensor([1, 2, 0]), torch.ones(3))
    assert adjacency_discrepancy(alpha, graph, "positive").tolist() == [0, 0, 0]


def test_printed_sharpness_turns_negative_with_sharp_evidence() -> None:
    """A conflicting neighbour has d > 0 under flat evidence and d < 0 under sharp: the split is inverted."""
    graph = Neighbourhoods(torch.tensor([0, 2]), torch.tensor([1, 2]), torch.ones(2))
    flat = torch.tensor([[3.0, 2, 2, 2], [3, 2, 2, 2], [2, 3, 2, 2]])
    sharp = torch.tensor([[90.0, 1, 1, 1], [90, 1, 1, 1], [1, 90, 1, 1]])
    assert adjacency_discrepancy(flat, graph)[0] == 0 < adjacency_discrepancy(flat, graph)[1]
    assert adjacency_discrepancy(sharp, graph)[1] < 0 == adjacency_discrepancy(sharp, graph)[0]
    assert adjacency_discrepancy(sharp, graph, "positive")[1] > 0


def test_sharpness_is_exact_where_one_class_has_all_the_evidence() -> None:
    alpha = torch.ones(2, 3)
    alpha[1, 2] = 1e12  # S - max is 0 in float32
    graph = Neighbourhoods(torch.tensor([0, 1]), torch.tensor([1]), torch.ones(1))
    assert sharpness(alpha, graph).item() == pytest.approx(math.log(2) - 12 * math.log(10), rel=1e-6)


def test_isolated_anchors_have_no_value_and_no_edges() -> None:
    alpha = 1 + torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    empty = Neighbourhoods(torch.tensor([0, 0, 0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]))
    assert sharpness(alpha, empty).isnan().all() and divergence(alpha, empty).isnan().all()
    assert adjacency_discrepancy(alpha, empty).shape == conflict(alpha, empty).shape == (0,)
    assert split_pairs(adjacency_discrepancy(alpha, empty), empty, 0.1).positive.shape == (0,)


def test_negative_sharpness_share_leaves_out_the_isolated() -> None:
    assert negative_sharpness_share(torch.tensor([-1.0, 2.0, 0.0, torch.nan, -3.0])) == 0.5
    assert math.isnan(negative_sharpness_share(torch.tensor([torch.nan, torch.nan])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_split_is_strict_below_epsilon(dtype: torch.dtype) -> None:
    """M+(i) = {k : d_ik < epsilon}, M-(i) = {k : d_ik >= epsilon}."""
    graph = Neighbourhoods(torch.tensor([0, 2, 2, 4]), torch.tensor([1, 2, 0, 1]), torch.ones(4))
    pairs = split_pairs(torch.tensor([0.1, 0.3, -0.5, 0.1000001], dtype=dtype), graph, 0.1)
    assert pairs.positive.tolist() == [False, False, True, False]
    assert pairs.anchor.tolist() == [0, 0, 2, 2]
    assert pairs.other.tolist() == [1, 2, 0, 1]


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40), st.floats(0, 1))
def test_positive_quantile_is_the_quantile(values: list[float], q: float) -> None:
    ads = torch.tensor(values, dtype=torch.float64)
    epsilon = positive_quantile(ads, q)
    assert epsilon == pytest.approx(torch.quantile(ads, q).item(), abs=1e-9)
    assert (ads < epsilon - 1e-9).sum() <= math.ceil(q * (len(ads) - 1) + 1e-9)


def test_half_of_distinct_discrepancies_are_positive() -> None:
    ads = torch.rand(101, generator=torch.Generator().manual_seed(0))
    assert int((ads < positive_quantile(ads, 0.5)).sum()) == 50


def test_bad_input_is_named() -> None:
    alpha = torch.ones(3, 4) * 2
    graph = Neighbourhoods(torch.tensor([0, 1, 2]), torch.tensor([2, 0]), torch.ones(2))
    wrong = alpha.clone()
    wrong[1, 3] = -2
    loose_sharpness, loose_ads = inspect.unwrap(sharpness), inspect.unwrap(adjacency_discrepancy)
    for call, message in (
        (lambda: sharpness(wrong, graph), r"sharpness: alpha\[1, 3\] = -2"),
        (lambda: divergence(alpha[:2], graph), "a neighbour is row 2, alpha has 2 rows"),
        (lambda: conflict(alpha, graph, wrong[1:]), r"conflict, anchors: alpha\[0, 3\] = -2"),
        (lambda: conflict(alpha, graph, alpha), r"shape \(3, 4\), needs \(2, 4\)"),
        (lambda: sharpness(alpha[:, :1], graph), r"needs \[N >= 1, C >= 2\]"),
        (lambda: adjacency_discrepancy(alpha[:0], graph), r"alpha has shape \(0, 4\)"),
        (lambda: adjacency_discrepancy(alpha, graph, factors=()), r"factors = \(\)"),
        (lambda: adjacency_discrepancy(alpha, graph, factors=("conflict", "conflict")), "each once"),
        (lambda: loose_ads(alpha, graph, factors=("conf",)), "factors = 'conf' is unknown"),
        (lambda: loose_sharpness(alpha, graph, "printed"), "form = 'printed' is unknown"),
        (lambda: split_pairs(torch.ones(3), graph, 0.5), "3 discrepancies for 2 edges"),
        (lambda: split_pairs(torch.ones(2), graph, math.nan), "epsilon = nan"),
        (lambda: split_pairs(torch.tensor([0, math.nan]), graph, 0.5), r"ads\[1\] = nan"),
        (lambda: positive_quantile(torch.tensor([math.inf]), 0.5), r"ads\[0\] = inf"),
        (lambda: positive_quantile(torch.tensor([]), 0.5), "no edges"),
        (lambda: positive_quantile(torch.ones(2), 1.5), "q = 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    more = Neighbourhoods(torch.tensor([0, 1, 1, 1, 1]), torch.tensor([2]), torch.ones(1))
    with pytest.raises(ValueError, match="4 anchors, 3 rows of alpha; pass anchor_alpha"):
        divergence(alpha, more)
