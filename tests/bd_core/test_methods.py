"""Merging methods against slow references written from their formulas, and what all of them promise."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bd_core.methods import METHODS, adamerging, merge, twin_merging
from bd_core.task_vectors import IncompatibleCheckpoints

State = dict[str, Tensor]
TASKS = ("a", "b")


def states(n_experts: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(seed)

    def one() -> State:
        return {
            "w": torch.randn(3, 4, generator=generator).to(dtype),
            "b": torch.randn(3, generator=generator).to(dtype),
            "count": torch.tensor(3),
        }

    return one(), [one() for _ in range(n_experts)]


def logits(parameters: State, batch: Tensor, task: str) -> Tensor:
    sign = 1.0 if task == "a" else -1.0
    return sign * F.linear(batch, parameters["w"], parameters["b"])


def batches(seed: int = 0) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield {task: torch.randn(8, 4, generator=generator) for task in TASKS}


def run(method: str, base: State, experts: list[State]) -> State:
    if method == "adamerging":
        return merge(method, base, experts, logits=logits, batches=batches(), steps=5)
    if method == "twin_merging":
        twin = twin_merging(base, experts)
        exclusive = twin.exclusive.expanded().vectors
        return twin.shared | {f"v.{name}": tensor for name, tensor in exclusive.items()}
    return merge(method, base, experts)


# What files alone can be merged with, and two that the tests can feed.
GENERIC = [m.name for m in METHODS.values() if m.from_files and m.experts == "checkpoints"] + [
    "adamerging",
    "twin_merging",
]


def flat(state: State) -> Tensor:
    return torch.cat([state[name].flatten().double() for name in ("w", "b")])


# --- what every method promises ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", GENERIC)
def test_inputs_are_kept_and_merging_twice_gives_equal_bytes(method: str) -> None:
    base, experts = states()
    kept = copy.deepcopy((base, experts))
    first, second = run(method, base, experts), run(method, base, experts)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    for state, before in zip((base, *experts), (kept[0], *kept[1]), strict=True):
        for name, tensor in state.items():
            assert torch.equal(tensor, before[name]) and not tensor.requires_grad, name


@pytest.mark.parametrize("method", GENERIC)
@pytest.mark.parametrize("kind", ["identical", "equal_to_base", "single"])
def test_degenerate_experts_give_no_nan(method: str, kind: str) -> None:
    base, experts = states()
    given = {"identical": [experts[0]] * 3, "equal_to_base": [base] * 3, "single": experts[:1]}[kind]
    found = run(method, base, given)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    if kind == "equal_to_base":
        assert torch.allclose(flat(found), flat(base), atol=1e-6)


@pytest.mark.parametrize("method", GENERIC)
def test_nan_and_misfits_are_errors(method: str) -> None:
    base, experts = states()
    del experts[2]["b"]
    with pytest.raises(IncompatibleCheckpoints, match="expert 2: b is missing"):
        run(method, base, experts)
    base, experts = states()
    experts[1]["b"][0] = float("nan")
    with pytest.raises(ValueError, match="expert 1: b holds NaN"):
        run(method, base, experts)
    with pytest.raises(ValueError, match="no expert"):
        run(method, base, [])


@pytest.mark.parametrize("method", [m for m in GENERIC if m != "twin_merging"])
def test_names_shapes_and_dtypes_are_the_bases(method: str) -> None:
    base, experts = states(dtype=torch.float32)
    base, *experts = (
        {name: t.bfloat16() if t.is_floating_point() else t for name, t in s.items()} for s in (base, *experts)
    )
    if method == "adamerging":

        def wide_logits(parameters: State, batch: Tensor, task: str) -> Tensor:
            return logits({name: tensor.float() for name, tensor in parameters.items()}, batch, task)

        found = merge(method, base, experts, logits=wide_logits, batches=batches(), steps=2)
    else:
        found = run(method, base, experts)
    assert list(found) == list(base)
    for name, tensor in found.items():
        assert tensor.dtype == base[name].dtype and tensor.shape == base[name].shape
        assert tensor.data_ptr() != base[name].data_ptr()


# --- formulas ---------------------------------------------------------------------------------------------------------


def test_weight_average_is_the_mean_of_the_experts() -> None:
    base, experts = states()
    assert torch.allclose(flat(merge("weight_average", base, experts)), sum(map(flat, experts)) / 3, atol=1e-6)


def test_task_arithmetic_adds_scaled_vectors() -> None:
    base, experts = states()
    wanted = flat(base) + 0.3 * sum(flat(expert) - flat(base) for expert in experts)
    assert torch.allclose(flat(merge("task_arithmetic", base, experts)), wanted, atol=1e-6)
    assert torch.equal(flat(merge("task_arithmetic", base, experts, scale=0.0)), flat(base))


def slow_ties(
    base: list[float], experts: list[list[float]], kept: list[set[int]], scale: float, how: str, tie: float
) -> list[float]:
    """Ties entry by entry, given which entries of each expert survive the trim."""
    merged = []
    for i, origin in enumerate(base):
        values = [expert[i] - origin if i in kept[k] else 0.0 for k, expert in enumerate(experts)]
        total = sum(values)
        sign = math.copysign(1.0, total) if total != 0 else tie
        agreeing = [value for value in values if value * sign > 0]
        step = sum(agreeing)
        if how == "mean" and agreeing:
            step /= len(agreeing)
        merged.append(origin + scale * step)
    return merged


@settings(max_examples=30, deadline=None)
@given(
    n_experts=st.integers(1, 4),
    keep=st.sampled_from([0.1, 0.2, 0.5, 1.0]),
    trim=st.sampled_from(["global", "per_tensor"]),
    how=st.sampled_from(["sum", "mean"]),
    seed=st.integers(0, 999),
)
def test_ties_equals_its_definition(n_experts: int, keep: float, trim: Any, how: Any, seed: int) -> None:
    base, experts = states(n_experts, seed, torch.float64)
    found = flat(merge("ties", base, experts, keep=keep, trim=trim, merge=how)).tolist()
    ranges = [range(15)] if trim == "global" else [range(12), range(12, 15)]
    kept: list[set[int]] = []
    for expert in experts:
        vector = (flat(expert) - flat(base)).abs().tolist()
        survivors: set[int] = set()
        for places in ranges:
            # The paper's code keeps one entry more than int(keep n); mergekit's keeps int(keep n), at least one.
            count = (
                min(len(places), int(keep * len(places)) + 1) if trim == "global" else max(1, int(keep * len(places)))
            )
            survivors |= set(sorted(places, key=lambda i: -vector[i])[:count])
        kept.append(survivors)
    rows = [flat(expert).tolist() for expert in experts]
    assert found == pytest.approx(slow_ties(flat(base).tolist(), rows, kept, 0.3, how, 1.0), abs=1e-9)


def test_ties_gives_exact_cancellation_the_majority_sign() -> None:
    base = {"w": torch.zeros(4)}
    experts = [{"w": torch.tensor([1.0, -2.0, -2.0, -2.0])}, {"w": torch.tensor([-1.0, -2.0, -2.0, -2.0])}]
    assert merge("ties", base, experts, keep=1.0, scale=1.0)["w"][0] == -1.0
    assert merge("ties", base, experts, keep=1.0, scale=1.0, trim="per_tensor")["w"][0] == 1.0


def test_ties_trims_are_close_to_each_other() -> None:
    """Where tensors have like scales, one threshold for all is nearly one for each."""
    torch.manual_seed(0)
    base = {"w": torch.randn(64, 64), "b": torch.randn(64, 32)}
    experts = [{name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in base.items()} for _ in range(4)]
    one, other = (flat(merge("ties", base, experts, trim=trim)) - flat(base) for trim in ("global", "per_tensor"))
    assert F.cosine_similarity(one, other, dim=0) > 0.97


def slow_adamerging(base: State, experts: list[State], steps: int) -> Tensor:
    """All tasks' graphs summed, autograd through the merge, as the paper writes it."""
    raw = {name: torch.full((len(experts),), 0.3, requires_grad=True) for name in ("w", "b")}
    optimiser = torch.optim.Adam(raw.values(), lr=1e-3)
    stream = batches()
    for _ in range(steps):
        loss = torch.zeros(())
        merged = {
            name: base[name]
            + sum(raw[name].clamp(0, 1)[k] * (experts[k][name] - base[name]) for k in range(len(experts)))
            for name in raw
        }
        for task, batch in next(stream).items():
            p = logits(merged, batch, task).softmax(-1)
            loss = loss - (p * p.log()).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return torch.stack([raw[name].detach().clamp(0, 1) for name in ("w", "b")])


def test_adamerging_equals_autograd_through_the_merge() -> None:
    base, experts = states()
    found = adamerging(base, experts, logits=logits, batches=batches(), steps=30)
    assert found.names == ("w", "b")
    assert torch.allclose(found.coefficients, slow_adamerging(base, experts, 30), atol=1e-5)
    assert len(found.history) == 30 and not found.converged
    wanted = base["w"] + sum(found.coefficients[0, k] * (experts[k]["w"] - base["w"]) for k in range(3))
    assert torch.allclose(found.merged["w"], wanted, atol=1e-6)


def test_adamerging_lowers_its_loss_and_stops_when_it_no_longer_falls() -> None:
    base, experts = states()
    fixed = next(batches())
    found = adamerging(base, experts, logits=logits, batches=iter([fixed] * 2000), steps=2000, learning_rate=0.02)
    assert found.history[-1] < found.history[0]
    assert found.converged and 100 <= len(found.history) < 2000
    assert float(found.coefficients.min()) >= 0.0 and float(found.coefficients.max()) <= 1.0
    endless = adamerging(base, experts, logits=logits, batches=iter([fixed] * 150), steps=2000, tolerance=0.0)
    assert len(endless.history) == 150 and not endless.converged


def test_adamerging_draws_no_batch_too_many() -> None:
    drawn = []

    def counted() -> Iterator[dict[str, Tensor]]:
        for batch in batches():
            drawn.append(1)
            yield batch

    base, experts = states()
    adamerging(base, experts, logits=logits, batches=counted(), steps=3)
    assert len(drawn) == 3


def test_adamerging_errors() -> None:
    base, experts = states()
    for extra, text in (
        ({"steps": 0}, "steps=0"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
        ({"batches": iter([])}, "no batch"),
        ({"batches": iter([{}])}, "empty"),
        ({"batches": iter([{"a": torch.full((2, 4), float("nan"))}])}, "task a is NaN"),
    ):
        with pytest.raises(ValueError, match=text):
            adamerging(base, experts, **{"logits": logits, "batches": batches(), **extra})


def test_twin_merging_recovers_an_expert_by_its_exclusive_part() -> None:
    base, experts = states()
    twin = twin_merging(base, experts, rank_share=1.0)
    exclusive = twin.exclusive.expanded().vectors
    assert torch.equal(flat(twin.shared), flat(merge("task_arithmetic", base, experts)))
    for k, expert in enumerate(experts):
        for name in ("w", "b"):
            assert torch.allclose(twin.shared[name] + exclusive[name][k], expert[name], atol=1e-5)


def test_twin_merging_cuts_its_exclusive_part() -> None:
    torch.manual_seed(0)
    base = {"w": torch.randn(20, 30)}
    experts = [{"w": torch.randn(20, 30)} for _ in range(3)]
    cut = twin_merging(base, experts, rank_share=0.2).exclusive
    assert cut.factors["w"][0].shape == (3, 20, 4)


# --- the door ---------------------------------------------------------------------------------------------------------


def test_every_method_says_what_it_needs() -> None:
    for method in METHODS.values():
        assert (
            method.function.__doc__
            and "Source:" in method.function.__doc__
            and "ost:" in (method.function.__doc__.replace("Memory:", "Cost:"))
        )
    assert METHODS["ties"].defaults == {"keep": 0.2, "scale": 0.3, "trim": "global", "merge": "sum"}
    assert METHODS["adamerging"].required == ("logits", "batches")


@pytest.mark.parametrize(
    ("method", "parameters", "text"),
    [
        ("tie", {}, "no merging method 'tie'; did you mean ties"),
        ("xyzzy", {}, "known: weight_average, task_arithmetic"),
        ("task_arithmetic", {"scales": 0.3}, "no parameter 'scales'; did you mean scale"),
        ("weight_average", {"scale": 0.3}, "no parameter 'scale'; it takes none"),
        ("adamerging", {"logits": logits}, r"needs batches \(it needs unlabelled batches\)"),
        ("twin_merging", {}, "a model per sample"),
        ("ties", {"keep": 0.0}, r"keep=0\.0"),
        ("ties", {"trim": "rows"}, "trim(.|\\n)*'rows'"),
        ("ties", {"merge": "max"}, "merge(.|\\n)*'max'"),
        ("task_arithmetic", {"scale": float("nan")}, "scale=nan"),
    ],
)
def test_wrong_names_and_values(method: str, parameters: dict[str, Any], text: str) -> None:
    base, experts = states()
    with pytest.raises((ValueError, TypeError), match=text):
        merge(method, base, experts, **parameters)
