"""What all matrix methods promise: no NaN, nothing modified, the order of experts, dtypes, bounded memory."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix_cases import MATRICES, State, states
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bd_core.methods.ace import ace
from bd_core.methods.bmm import bmm
from bd_core.methods.iso_c import iso_c
from bd_core.methods.lot import lot
from bd_core.methods.regmean import regmean
from bd_core.methods.tsv_m import tsv_m
from bd_core.methods.wudi import wudi, wudi_exact

Function = Callable[..., Any]
FUNCTIONS: dict[str, tuple[Function, dict[str, Any]]] = {
    "iso_c": (iso_c, {}),
    "tsv_m": (tsv_m, {}),
    "wudi": (wudi, {"steps": 5}),
    "wudi_exact": (wudi_exact, {}),
    "ace": (ace, {}),
    "ace_gated": (ace, {"gate": 0.0}),
    "ace_paper": (ace, {"variant": "paper", "epsilon": 1e-2}),
    "bmm": (bmm, {}),
    "regmean": (regmean, {}),
    "lot": (lot, {}),
}


def grams(n_experts: int, seed: int = 5) -> State:
    generator = torch.Generator().manual_seed(seed)
    widths = {name: 24 if name == "blocks.1.mlp.weight" else 12 for name in MATRICES}
    inputs = {name: torch.randn(n_experts, 40, width, generator=generator) for name, width in widths.items()}
    return {name: x.mT @ x / 40 for name, x in inputs.items()}


def run(method: str, base: State, experts: list[State], given: State | None = None) -> dict[str, Tensor]:
    function, parameters = FUNCTIONS[method]
    data = {"grams": given or grams(len(experts))} if method in ("regmean", "lot") else {}
    return dict(function(base, experts, **data, **parameters))


@pytest.mark.parametrize("method", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_name_once_in_the_bases_dtype_and_inputs_kept(method: str, dtype: torch.dtype) -> None:
    base, experts = states(dtype=dtype)
    kept = copy.deepcopy((base, experts))
    function, parameters = FUNCTIONS[method]
    data = {"grams": grams(len(experts))} if method in ("regmean", "lot") else {}
    found = list(function(base, experts, **data, **parameters))
    assert sorted(name for name, _ in found) == sorted(base)
    for name, tensor in found:
        assert tensor.dtype == base[name].dtype and tensor.shape == base[name].shape
        assert bool(torch.isfinite(tensor).all()) and tensor.data_ptr() != base[name].data_ptr()
    for state, before in zip((base, *experts), (kept[0], *kept[1]), strict=True):
        assert all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize("method", FUNCTIONS)
@pytest.mark.parametrize("kind", ["single", "identical", "equal_to_base", "one_equal_to_base", "low_rank"])
def test_degenerate_experts_give_no_nan(method: str, kind: str) -> None:
    base, experts = states(dtype=torch.float32)
    if kind == "low_rank":
        for expert in experts:
            for name in MATRICES:
                step = torch.outer(expert[name][:, 0], expert[name][0])
                expert[name] = base[name] + 0.1 * step
    choices = {
        "single": experts[:1],
        "identical": [experts[0]] * 3,
        "equal_to_base": [base] * 3,
        "one_equal_to_base": [experts[0], base, experts[1]],
    }
    found = run(method, base, choices.get(kind, experts))
    for name, tensor in found.items():
        assert bool(torch.isfinite(tensor).all()), name
        if kind == "equal_to_base":
            assert torch.allclose(tensor.double(), base[name].double(), atol=1e-5), name


@pytest.mark.parametrize("method", FUNCTIONS)
def test_the_order_of_experts_changes_nothing(method: str) -> None:
    base, experts = states(4)
    given = grams(4)
    first = run(method, base, experts, given)
    second = run(method, base, experts[::-1], {name: gram.flip(0) for name, gram in given.items()})
    for name in base:
        assert torch.allclose(first[name], second[name], rtol=0, atol=1e-7), name


@pytest.mark.parametrize("method", FUNCTIONS)
def test_nan_names_the_tensor_and_the_expert(method: str) -> None:
    for name in ("blocks.1.attn.weight", "ln.bias"):
        base, experts = states(dtype=torch.float32)
        experts[2][name].view(-1)[3] = float("nan")
        with pytest.raises(ValueError, match=f"expert 2: {name} holds NaN"):
            run(method, base, experts)


@pytest.mark.parametrize("method", ["iso_c", "tsv_m", "wudi_exact", "ace"])
def test_batches_of_layers_change_nothing(method: str) -> None:
    base, experts = states()
    function, parameters = FUNCTIONS[method]
    whole, single = dict(function(base, experts, **parameters)), dict(function(base, experts, budget_bytes=1))
    assert all(torch.allclose(whole[name], single[name], rtol=0, atol=1e-10) for name in base)


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that tensors made under it keep alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.users: Counter[int] = Counter()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(tensor) for tensor in args if isinstance(tensor, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and id(tensor) not in given:
                pointer, size = tensor.data_ptr(), tensor.untyped_storage().nbytes()
                pointer -= tensor.storage_offset() * tensor.element_size()
                self.now += 0 if self.users[pointer] else size
                self.users[pointer] += 1
                weakref.finalize(tensor, self.drop, pointer, size)
        self.most = max(self.most, self.now)
        return result

    def drop(self, pointer: int, size: int) -> None:
        self.users[pointer] -= 1
        self.now -= 0 if self.users[pointer] else size


@pytest.mark.parametrize("method", ["iso_c", "tsv_m", "wudi_exact", "ace", "bmm"])
def test_memory_does_not_grow_with_the_experts(method: str) -> None:
    def most(n_experts: int) -> int:
        generator = torch.Generator().manual_seed(0)
        base = {f"blocks.{i}.mlp": torch.randn(96, 64, generator=generator) for i in range(3)}
        experts = [{name: 1.1 * tensor + 0.01 * k for name, tensor in base.items()} for k in range(n_experts)]
        settings = {"anchor": "tsv_m"} if method == "bmm" else {"budget_bytes": 1}
        with Live() as live:
            for _ in FUNCTIONS[method][0](base, experts, **settings):
                pass
        return live.most

    assert most(16) <= 1.1 * most(2)
