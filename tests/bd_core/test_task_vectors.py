"""State-dict arithmetic, its checks, layer groups and compression."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bd_core.compression import svd_compress
from bd_core.task_vectors import (
    IncompatibleCheckpoints,
    TaskVectors,
    add_task_vectors,
    layer_groups,
    task_vectors,
)

State = dict[str, Tensor]


def states(n_experts: int = 3, dtype: torch.dtype = torch.float32) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(0)

    def one() -> State:
        return {
            "w": torch.randn(4, 3, generator=generator).to(dtype),
            "b": torch.randn(4, generator=generator).to(dtype),
            "s": torch.randn((), generator=generator).to(dtype),
            "ids": torch.arange(5),
            "mask": torch.tensor([True, False]),
        }

    return one(), [one() for _ in range(n_experts)]


def test_vectors_are_differences_and_integers_are_constants() -> None:
    base, experts = states()
    vectors = task_vectors(base, experts)
    assert vectors.names == ("w", "b", "s")
    assert vectors.n_experts == 3
    assert set(vectors.constants) == {"ids", "mask"}
    assert vectors.size_bytes == 3 * (12 + 4 + 1) * 4
    for name in vectors.names:
        for k, expert in enumerate(experts):
            assert torch.equal(vectors.vectors[name][k], expert[name] - base[name])


def test_half_precision_differences_are_exact() -> None:
    base, experts = states(2, torch.bfloat16)
    vectors = task_vectors(base, experts)
    assert vectors.vectors["w"].dtype == torch.float32
    back = add_task_vectors(base, vectors, torch.tensor([0.0, 1.0]))
    assert back["w"].dtype == torch.bfloat16
    assert torch.equal(back["w"], experts[1]["w"])


def test_one_expert_equal_to_the_base_gives_zero_vectors() -> None:
    base, _ = states()
    vectors = task_vectors(base, [base])
    assert vectors.n_experts == 1
    assert all(not tensor.any() for tensor in vectors.vectors.values())


@settings(max_examples=30, deadline=None)
@given(n_experts=st.integers(1, 5), seed=st.integers(0, 1000))
def test_adding_equals_the_loop(n_experts: int, seed: int) -> None:
    base, experts = states(n_experts)
    c_K = torch.randn(n_experts, generator=torch.Generator().manual_seed(seed))
    merged = add_task_vectors(base, task_vectors(base, experts), c_K)
    for name in ("w", "b", "s"):
        wanted = base[name].clone()
        for k in range(n_experts):
            wanted += c_K[k] * (experts[k][name] - base[name])
        assert torch.allclose(merged[name], wanted, atol=1e-5)
    assert torch.equal(merged["ids"], base["ids"]) and merged["ids"] is not base["ids"]


def test_all_differences_come_in_one_message() -> None:
    base, experts = states()
    del experts[0]["b"]
    experts[0]["extra"] = torch.zeros(1)
    experts[1]["w"] = torch.zeros(3, 4)
    experts[1]["s"] = experts[1]["s"].double()
    experts[2]["ids"] = torch.arange(5) + 1
    with pytest.raises(IncompatibleCheckpoints) as caught:
        task_vectors(base, experts)
    text = str(caught.value)
    assert "in 5 places" in text
    for line in (
        "expert 0: b is missing",
        "expert 0: extra is not in the base",
        "expert 1: w has shape [3, 4], the base [4, 3]",
        "expert 1: s is torch.float64, the base torch.float32",
        "expert 2: ids (torch.int64) has other values",
    ):
        assert line in text


def test_many_differences_are_counted() -> None:
    base = {f"p{i}": torch.zeros(1) for i in range(40)}
    with pytest.raises(IncompatibleCheckpoints, match=r"in 41 places(.|\n)*and 29 more"):
        task_vectors(base, [{"q": torch.zeros(1)}])


def test_batch_norm_counters_may_differ() -> None:
    base = {"w": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(1)}
    expert = {"w": torch.ones(2), "bn.num_batches_tracked": torch.tensor(9)}
    merged = add_task_vectors(base, task_vectors(base, [expert]), torch.ones(1))
    assert merged["bn.num_batches_tracked"] == 1


def test_nan_is_an_error_that_names_the_tensor() -> None:
    base, experts = states()
    experts[1]["w"][2, 1] = float("nan")
    with pytest.raises(ValueError, match="expert 1: w holds NaN"):
        task_vectors(base, experts)


def test_infinities_pass_only_where_all_agree() -> None:
    base, experts = states()
    for state in (base, *experts):
        state["causal"] = torch.full((2, 2), float("-inf")).triu(1)
    vectors = task_vectors(base, experts)
    assert "causal" in vectors.constants
    experts[0]["causal"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="causal holds infinities"):
        task_vectors(base, experts)


@pytest.mark.parametrize(("base", "experts"), [({}, [{}]), ({"w": torch.zeros(1)}, []), ({"i": torch.arange(2)},) * 2])
def test_nothing_to_merge(base: State, experts: list[State]) -> None:
    with pytest.raises(ValueError, match=r"empty|no expert|no floating-point"):
        task_vectors(base, [base] if isinstance(experts, dict) else experts)


def test_vectors_of_unequal_count_are_refused() -> None:
    with pytest.raises(ValueError, match="one common number"):
        TaskVectors({"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)})


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (
            "class_embedding positional_embedding proj conv1.weight ln_pre.weight transformer.resblocks.0.attn.w "
            "transformer.resblocks.10.attn.w transformer.resblocks.2.mlp.w ln_post.weight",
            {"stem": 4, "block 0": 1, "block 2": 1, "block 10": 1, "head": 2},
        ),
        (
            "visual.class_embedding visual.proj visual.transformer.resblocks.0.w visual.ln_post.weight",
            {"stem": 1, "block 0": 1, "head": 2},
        ),
        (
            "conv1.weight bn1.weight layer1.0.w layer1.1.w layer2.0.w fc.weight",
            {"stem": 2, "layer1.0": 1, "layer1.1": 1, "layer2.0": 1, "head": 1},
        ),
        ("cls_token patch_embed.proj.weight blocks.0.w norm.weight", {"stem": 2, "block 0": 1, "head": 1}),
        ("0.weight 0.bias 2.weight", {"block 0": 2, "block 2": 1}),
        ("weight bias", {"stem": 2}),
        (
            "vision_model.embeddings.class_embedding vision_model.encoder.layers.0.w vision_model.post_layernorm.w "
            "text_model.embeddings.w text_model.encoder.layers.0.w text_model.encoder.layers.1.w",
            {
                "vision_model stem": 1,
                "vision_model.encoder.layers.0": 1,
                "vision_model head": 1,
                "text_model stem": 1,
                "text_model.encoder.layers.0": 1,
                "text_model.encoder.layers.1": 1,
            },
        ),
    ],
    ids=["open_clip", "prefixed", "resnet", "timm", "sequential", "flat", "two_towers"],
)
def test_layer_groups(names: str, titles: dict[str, int]) -> None:
    groups = layer_groups(names.split())
    assert groups.titles == tuple(titles)
    assert groups.n_groups == len(titles)
    counted = {title: list(groups.index.values()).count(i) for i, title in enumerate(groups.titles)}
    assert counted == titles


def test_a_matrix_of_low_rank_survives_its_svd() -> None:
    torch.manual_seed(0)
    stacked = torch.randn(2, 12, 3) @ torch.randn(2, 3, 10)
    vectors = TaskVectors({"w": stacked, "b": torch.randn(2, 12)})
    cut = svd_compress(vectors, rank=3)
    assert cut.factors["w"][0].shape == (2, 12, 3) and cut.factors["w"][1].shape == (2, 3, 10)
    assert torch.allclose(cut.expanded().vectors["w"], stacked, atol=1e-5)
    assert torch.equal(cut.expanded().vectors["b"], vectors.vectors["b"])
    assert cut.relative_error["w"] < 1e-5 and cut.relative_error["b"] == 0.0
    assert cut.size_bytes < vectors.size_bytes


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 12), columns=st.integers(2, 12), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_stated_error_is_the_error(rows: int, columns: int, rank: int, seed: int) -> None:
    stacked = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cut = svd_compress(TaskVectors({"w": stacked}), rank=rank)
    error = float((cut.expanded().vectors["w"] - stacked).norm() / stacked.norm())
    assert cut.relative_error["w"] == pytest.approx(error, abs=1e-9)
    assert ("w" in cut.dense) == (rank * (rows + columns) >= rows * columns)


def test_energy_keeps_its_share_and_rank_share_rounds_up() -> None:
    torch.manual_seed(0)
    spectrum = torch.tensor([10.0, 5.0, 1.0, 0.5, *[0.1] * 26])
    q = torch.linalg.qr(torch.randn(30, 30))[0]
    vectors = TaskVectors({"w": (q * spectrum @ q.T)[None]})
    cut = svd_compress(vectors, energy=0.95)
    assert cut.factors["w"][0].shape[-1] == 2
    assert 1 - cut.relative_error["w"] ** 2 >= 0.95
    assert svd_compress(vectors, rank_share=0.1).factors["w"][0].shape[-1] == 3
    assert svd_compress(vectors, rank_share=0.11).factors["w"][0].shape[-1] == 4


def test_zero_vectors_and_kernels_compress() -> None:
    cut = svd_compress(TaskVectors({"k": torch.zeros(2, 8, 3, 3, 3)}), rank=2)
    assert cut.factors["k"][1].shape == (2, 2, 27)
    assert cut.relative_error["k"] == 0.0
    assert cut.expanded().vectors["k"].shape == (2, 8, 3, 3, 3)


@pytest.mark.parametrize(
    "criteria", [{}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"rank_share": 0.0}, {"energy": 1.5}], ids=str
)
def test_bad_criteria(criteria: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"rank|energy"):
        svd_compress(TaskVectors({"w": torch.zeros(1, 4, 4)}), **criteria)  # type: ignore[arg-type]
