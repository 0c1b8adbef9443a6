"""The streaming ground under all methods: selection without sorting, chunks, what is not merged; DARE on top of it."""

from collections.abc import Iterator, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd_core.methods import merge, merge_stream, selection, stream
from bd_core.methods.selection import kth_smallest, kth_smallest_rows
from bd_core.methods.stream import matrix_names, merged_names, same_shape
from bd_core.task_vectors import IncompatibleCheckpoints


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    sampled=st.sampled_from([2, 16, 4096]),
    drift=st.sampled_from([0.0, 5.0]),
)
def test_kth_smallest_equals_sorting(sizes: list[int], share: float, seed: int, sampled: int, drift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    # With drift the stream's later chunks are larger, so that a thin sample misleads the first bracket.
    parts = [torch.randn(3, size, generator=generator).round(decimals=1) + drift * i for i, size in enumerate(sizes)]
    whole, before = torch.cat(parts, dim=1), selection.SAMPLED
    k = 1 + int(share * (whole.shape[1] - 1))
    selection.SAMPLED = sampled
    try:
        found = kth_smallest_rows(lambda: iter(parts), [k, 1, whole.shape[1]])
    finally:
        selection.SAMPLED = before
    ordered = whole.sort(dim=1).values
    assert found.tolist() == [ordered[0, k - 1].item(), ordered[1, 0].item(), ordered[2, -1].item()]


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 3000), share=st.floats(0, 1), seed=st.integers(0, 99), sampled=st.sampled_from([2, 64]))
def test_a_thinned_first_reading_changes_nothing(size: int, share: float, seed: int, sampled: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(2, size, generator=generator).round(decimals=1)
    k = 1 + int(share * (size - 1))
    before, selection.SAMPLED = selection.SAMPLED, sampled
    try:
        thinned = (lambda stride: iter(whole[:, ::stride].split(50, dim=1)), size)
        found = kth_smallest_rows(lambda: iter(whole.split(70, dim=1)), [k, size], thinned=thinned)
    finally:
        selection.SAMPLED = before
    ordered = whole.sort(dim=1).values
    assert found.tolist() == [ordered[0, k - 1].item(), ordered[1, -1].item()]


def test_every_stride_th_entry_of_all_tensors_put_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = a_model()
    monkeypatch.setattr(stream, "CHUNK", 4)
    names = merged_names(base)
    whole = torch.cat([part.clone() for _, _, part in stream.chunks(base, experts, names)], dim=1)
    thinned = torch.cat([part.clone() for _, _, part in stream.chunks(base, experts, names, stride=3)], dim=1)
    assert torch.equal(thinned, whole[:, ::3])


def test_kth_smallest_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="k = \\[3\\] of 2 entries"):
        kth_smallest(lambda: iter([torch.zeros(2)]), 3)


def a_model(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "blocks.0.w": (5, 7),
        "blocks.1.w": (5, 7),
        "head.w": (3, 5),
        "b": (11,),
        "token_embedding.weight": (9, 2),
    }
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    base |= {"mask": torch.full((2, 2), -torch.inf), "steps": torch.tensor(3), "empty": torch.zeros(0)}
    experts = []
    for _ in range(3):
        moved = {name: base[name] + 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        experts.append({name: moved.get(name, tensor).to(tensor.dtype) for name, tensor in base.items()})
    return base, experts


class Counted(Mapping[str, Tensor]):
    """A state dict that counts how often each tensor is read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.reads = tensors, dict.fromkeys(tensors, 0)

    def __getitem__(self, name: str) -> Tensor:
        self.reads[name] += 1
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.mark.parametrize("method", ["weight_average", "task_arithmetic", "ties", "dare"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_small_chunks_and_lazy_state_dicts_change_nothing(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = a_model(dtype)
    whole = merge(method, base, experts)
    monkeypatch.setattr(stream, "CHUNK", 4)
    lazy = [Counted(expert) for expert in experts]
    streamed = dict(merge_stream(method, Counted(base), lazy))
    assert set(streamed) == set(base) and list(whole) == list(base)
    assert all(torch.equal(streamed[name], whole[name]) for name in base)
    # Layout, then one reading a pass.
    assert all(expert.reads["b"] <= 1 + {"ties": 3}.get(method, 1) for expert in lazy)


def test_what_is_merged_and_what_is_a_matrix() -> None:
    base, _ = a_model()
    assert merged_names(base) == ["blocks.0.w", "blocks.1.w", "head.w", "b", "token_embedding.weight"]
    assert matrix_names(base) == ["blocks.0.w", "blocks.1.w", "head.w"]
    assert list(same_shape(base, matrix_names(base), 3)) == [["blocks.0.w", "blocks.1.w"], ["head.w"]]
    assert list(same_shape(base, matrix_names(base), 3, budget_bytes=1)) == [["blocks.0.w"], ["blocks.1.w"], ["head.w"]]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("mask", torch.zeros(2, 2), None),
        ("mask", torch.full((2, 2), torch.inf), "expert 1: mask holds infinities that are not the base's"),
        ("mask", torch.full((2, 2), torch.nan), "expert 1: mask holds NaN"),
        ("b", torch.full((11,), torch.inf), "expert 1: b holds infinities"),
        ("b", torch.full((11,), torch.nan), "expert 1: b holds NaN"),
        ("steps", torch.tensor(4), "expert 1: steps"),
    ],
)
def test_values_that_cannot_be_merged(name: str, value: Tensor, text: str | None) -> None:
    base, experts = a_model()
    experts[1][name] = value
    if text is None:
        assert torch.equal(merge("task_arithmetic", base, experts)[name], base[name])
        return
    with pytest.raises((ValueError, IncompatibleCheckpoints), match=text):
        merge("task_arithmetic", base, experts)


def test_dare_drops_its_share_and_rescales_the_rest() -> None:
    base = {"w": torch.zeros(200, 100)}
    merged = merge("dare", base, [{"w": torch.ones(200, 100)}] * 2, drop=0.75, scale=1.0)["w"]
    values, counts = torch.unique(merged.round(), return_counts=True)
    assert values.tolist() == [0.0, 4.0, 8.0]
    # Two experts, each kept with probability 1/4, independently: 9/16, 6/16, 1/16 of 20,000 entries.
    assert counts.tolist() == pytest.approx([11250, 7500, 1250], abs=300)
    assert not torch.equal(merged, merge("dare", base, [{"w": torch.ones(200, 100)}] * 2, drop=0.75, seed=1)["w"])


def test_dare_dropping_nothing_is_the_merge_after_it() -> None:
    base, experts = a_model(torch.float64)
    for then in ("task_arithmetic", "ties"):
        kept, wanted = merge("dare", base, experts, drop=0.0, then=then), merge(then, base, experts)
        assert all(torch.allclose(kept[name], wanted[name], atol=1e-12) for name in merged_names(base))
