"""Representation Surgery: its formula, its fit against one Adam a task, its round trip."""

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

from bd_core.methods.averages import task_arithmetic
from bd_core.methods.surgery import Surgery, fit_surgery, surgery

State = dict[str, Tensor]
TASKS, WIDTH = ("a.b", "type"), 6  # names that attributes of a module could not have


def pairs(seed: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """The experts' features are the merged ones, shifted for one task and mirrored for the other."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        merged = {task: torch.randn(8, WIDTH, generator=generator).to(dtype) for task in TASKS}
        yield {TASKS[0]: (merged[TASKS[0]], merged[TASKS[0]].relu()), TASKS[1]: (merged[TASKS[1]], -merged[TASKS[1]])}


@settings(max_examples=20)
@given(n=st.integers(1, 4), width=st.integers(1, 5), rank=st.integers(1, 4), seed=st.integers(0, 99))
def test_forward_is_the_definition(n: int, width: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module = Surgery([f"task {t}" for t in range(n)], width, rank=rank, generator=generator).double()
    module.load_state_dict({k: torch.randn(v.shape, generator=generator) for k, v in module.state_dict().items()})
    z = torch.randn(3, width, generator=generator, dtype=torch.float64)
    down, up = module.down.tolist(), module.up.tolist()
    for t in range(n):
        found = module(z, f"task {t}").tolist()
        for b in range(3):
            hidden = [max(0.0, sum(down[t][r][d] * float(z[b, d]) for d in range(width))) for r in range(rank)]
            for d in range(width):
                bias = sum(up[t][d][r] * hidden[r] for r in range(rank))
                assert found[b][d] == pytest.approx(float(z[b, d]) - bias, abs=1e-9)


def slow_fit(steps: int, rank: int, seed: int) -> tuple[dict[str, tuple[Tensor, Tensor]], list[float]]:
    start = Surgery(TASKS, WIDTH, rank=rank, generator=torch.Generator().manual_seed(seed))
    parts = {
        task: (start.down[t].detach().clone().requires_grad_(), start.up[t].detach().clone().requires_grad_())
        for t, task in enumerate(TASKS)
    }
    optimisers = {task: torch.optim.Adam(part, lr=1e-2) for task, part in parts.items()}
    history, stream = [], pairs()
    for _ in range(steps):
        losses = []
        for task, (merged, expert) in next(stream).items():
            down, up = parts[task]
            loss = (merged - (merged @ down.T).relu() @ up.T - expert).abs().mean()
            optimisers[task].zero_grad()
            loss.backward()
            optimisers[task].step()
            losses.append(float(loss.detach()))
        history.append(sum(losses) / len(losses))
    return {task: (down.detach(), up.detach()) for task, (down, up) in parts.items()}, history


def test_the_fit_equals_one_adam_a_task() -> None:
    module, history = fit_surgery(pairs(), rank=4, steps=25, learning_rate=1e-2, seed=3)
    parts, slow_history = slow_fit(25, 4, 3)
    assert module.tasks == TASKS and not module.training
    for t, task in enumerate(TASKS):
        assert torch.allclose(module.down[t], parts[task][0], atol=1e-6)
        assert torch.allclose(module.up[t], parts[task][1], atol=1e-6)
    assert list(history) == pytest.approx(slow_history, rel=1e-5)


def test_it_starts_as_nothing_and_lowers_its_loss() -> None:
    z = torch.randn(3, WIDTH)
    assert torch.equal(Surgery(TASKS, WIDTH)(z, "type"), z)
    _, history = fit_surgery(pairs(), rank=16, steps=150, learning_rate=1e-2)
    assert history[-1] < 0.3 * history[0]


def test_state_dict_round_trip_and_seeds() -> None:
    module, _ = fit_surgery(pairs(), steps=3)
    other = Surgery(TASKS, WIDTH)
    other.load_state_dict(module.state_dict())
    z = torch.randn(4, WIDTH)
    assert torch.equal(other(z, "a.b"), module(z, "a.b"))
    again, _ = fit_surgery(pairs(), steps=3)
    assert torch.equal(again.down, module.down)
    assert not torch.equal(fit_surgery(pairs(), steps=3, seed=1)[0].down, module.down)


def test_half_precision_features_are_fitted_wide() -> None:
    module, history = fit_surgery(pairs(dtype=torch.bfloat16), steps=5)
    assert module.down.dtype == torch.float32 and all(map(math.isfinite, history))
    assert module(torch.ones(2, WIDTH, dtype=torch.bfloat16), "type").dtype == torch.bfloat16


def states(n_experts: int = 2) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(0)

    def one() -> State:
        return {"w": torch.randn(WIDTH, 4, generator=generator), "n": torch.tensor(3)}

    return one(), [one() for _ in range(n_experts)]


def features(state: Any, batch: Tensor) -> Tensor:
    return batch @ state["w"].T


def batches(n_tasks: int = 2) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield {f"task {t}": torch.randn(8, 4, generator=generator) for t in range(n_tasks)}


@pytest.mark.parametrize("kind", ["general", "identical", "equal_to_base", "single"])
def test_on_top_of_a_merge(kind: str) -> None:
    base, experts = states()
    some = {"identical": [experts[0]] * 2, "equal_to_base": [base] * 2, "single": experts[:1]}.get(kind, experts)
    kept = copy.deepcopy((base, some))
    found = surgery(base, some, features=features, batches=batches(len(some)), steps=4)
    assert torch.equal(found.merged["w"], dict(task_arithmetic(base, some))["w"])
    assert len(found.history) == 4 and all(map(math.isfinite, found.history))
    own = surgery(base, some, features=features, batches=batches(len(some)), merged=experts[1], steps=1)
    assert torch.equal(own.merged["w"], experts[1]["w"])
    for state, before in zip((base, *some), (kept[0], *kept[1]), strict=True):
        assert all(torch.equal(state[name], before[name]) for name in state)


def test_what_is_refused() -> None:
    base, experts = states()
    with pytest.raises(ValueError, match="of 1 tasks, there are 2 experts"):
        surgery(base, experts, features=features, batches=batches(1), steps=1)
    good = next(pairs())
    for steps, text in (
        ([], "no batch"),
        ([{}], "holds no task"),
        ([good, {"type": good["type"]}], "step 1 has tasks type, the first a.b, type"),
        ([{"x": (torch.ones(2, 3), torch.ones(2, 4))}], r"merged features \[2, 3\]"),
        ([{"x": (torch.full((2, 3), math.nan), torch.ones(2, 3))}], "loss of task x is not finite"),
    ):
        with pytest.raises(ValueError, match=text):
            fit_surgery(iter(steps))
    for parameters, text in (
        ({"rank": 0}, "rank=0"),
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0"),
    ):
        with pytest.raises(ValueError, match=text):
            fit_surgery(pairs(), **parameters)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no task 'z'"):
        Surgery(TASKS, WIDTH)(torch.ones(1, WIDTH), "z")
    for tasks in ((), ("a", "a")):
        with pytest.raises(ValueError, match="each once"):
            Surgery(tasks, WIDTH)
