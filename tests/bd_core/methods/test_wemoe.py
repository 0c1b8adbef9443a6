"""WEMoE: what is gated, where the gate starts, and every sample through its own merge."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from merged_cases import open_clip_vit
from torch import Tensor, nn
from torch.func import functional_call

from bd_core.merged import MergedModel
from bd_core.methods import merge
from bd_core.methods.wemoe import wemoe
from bd_core.router import Router
from bd_core.task_vectors import IncompatibleCheckpoints

State = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(6)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(6, 8))
        self.mlp.add_module("norm", nn.LayerNorm(8))
        self.mlp.add_module("c_proj", nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mlp(self.ln(x))
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.blocks(self.stem(x))
        return y


def nets(n_experts: int = 3, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, State, list[State]]:
    generator = torch.Generator().manual_seed(0)
    model = Net().eval()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def one() -> State:
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}

    return model, one(), [one() for _ in range(n_experts)]


GATED = [f"blocks.{i}.mlp.{part}.{kind}" for i in (0, 1) for part in ("c_fc", "c_proj") for kind in ("weight", "bias")]


def test_mlps_are_gated_and_the_rest_is_task_arithmetic() -> None:
    _, base, experts = nets()
    found, arithmetic = wemoe(base, experts), merge("task_arithmetic", base, experts)
    assert sorted(found.vectors.names) == sorted(GATED) and list(found.static) == list(base)
    assert found.groups.titles == ("block 0", "block 1")
    for name in base:
        wanted = base if name in GATED else arithmetic
        assert torch.equal(found.static[name], wanted[name]), name
        assert found.static[name].data_ptr() != base[name].data_ptr()
    for k, expert in enumerate(experts):
        assert torch.allclose(found.vectors.vectors[GATED[0]][k], expert[GATED[0]] - base[GATED[0]])


@pytest.mark.parametrize(
    ("names", "gated"),
    [
        (["visual.transformer.resblocks.0.mlp.c_fc", "visual.transformer.resblocks.0.attn.out_proj"], 1),
        (["vision_model.encoder.layers.0.mlp.fc1", "vision_model.encoder.layers.0.self_attn.k_proj"], 1),
        (["blocks.0.mlp.fc2", "blocks.0.attn.qkv"], 1),
        (
            [
                "encoder.layer.0.intermediate.dense",
                "encoder.layer.0.output.dense",
                "encoder.layer.0.attention.output.dense",
            ],
            2,
        ),
    ],
)
def test_names_of_open_clip_hugging_face_and_timm(names: list[str], gated: int) -> None:
    base = {f"{name}.weight": torch.ones(3, 3) for name in names} | {f"{name}.bias": torch.ones(3) for name in names}
    found = wemoe(base, [base])
    assert set(found.vectors.names) == {f"{name}.{kind}" for name in names[:gated] for kind in ("weight", "bias")}


def test_the_gate_starts_as_task_arithmetic() -> None:
    model, base, experts = nets()
    found = wemoe(base, experts, scale=0.4)
    gate = found.gate(5)
    weights = gate(torch.randn(7, 5))
    assert weights.shape == (7, 2, 3)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.4), atol=0.05, rtol=0)
    nn.init.zeros_(gate.layers[-1].weight)  # type: ignore[arg-type]
    x = torch.randn(7, 4)
    merged = MergedModel(model, found.static, found.vectors, found.groups)
    wanted = functional_call(model, merge("task_arithmetic", base, experts, scale=0.4), (x,))
    torch.testing.assert_close(merged(x, weights=gate(torch.randn(7, 5))), wanted, atol=1e-4, rtol=1e-4)


def test_every_sample_runs_through_its_own_merge() -> None:
    """FusionBench averages the weights over the batch, which moves a sample's features with its company."""
    model, base, experts = nets()
    found = wemoe(base, experts)
    generator = torch.Generator().manual_seed(1)
    x, weights = torch.randn(5, 4, generator=generator), torch.randn(5, 2, 3, generator=generator)
    merged = MergedModel(model, found.static, found.vectors, found.groups)
    together = merged(x, weights=weights)
    for b in range(5):
        state = dict(found.static)
        for name in GATED:
            g = int(name.split(".")[1])
            state[name] = base[name] + sum(weights[b, g, k] * (experts[k][name] - base[name]) for k in range(3))
        torch.testing.assert_close(together[b], functional_call(model, state, (x[b : b + 1],))[0], atol=1e-4, rtol=1e-4)
        alone = merged(x[b : b + 1], weights=weights[b : b + 1])[0]
        torch.testing.assert_close(together[b], alone, atol=1e-4, rtol=1e-4)


def test_a_weight_gated_without_its_bias_is_still_exact() -> None:
    model, base, experts = nets()
    found = wemoe(base, experts, gated=[r"c_fc\.weight"])
    merged = MergedModel(model, found.static, found.vectors, found.groups)
    x, weights = torch.randn(3, 4), torch.rand(3, 2, 3)
    together = merged(x, weights=weights)
    assert "only some of its parameters have task vectors" in str(merged.fallback_reason)
    state = dict(found.static)
    for g in (0, 1):
        name = f"blocks.{g}.mlp.c_fc.weight"
        state[name] = base[name] + torch.einsum("k,koi->oi", weights[1, g], found.vectors.vectors[name])
    torch.testing.assert_close(together[1], functional_call(model, state, (x[1:2],))[0], atol=1e-4, rtol=1e-4)


def test_an_open_clip_tower_keeps_its_batched_forms() -> None:
    model, images = open_clip_vit()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    experts = [{n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(2)]
    found = wemoe(base, experts)
    merged = MergedModel(model, found.static, found.vectors, found.groups)
    assert not merged.state_dict() and not list(merged.parameters())
    weights = torch.randn(len(images), found.groups.n_groups, 2, generator=generator)
    together = merged(images, weights=weights)
    assert merged.fallback_reason is None
    for b in range(len(images)):
        state = dict(found.static)
        for name, stacked in found.vectors.vectors.items():
            state[name] = base[name] + torch.einsum("k,k...->...", weights[b, found.groups.index[name]], stacked)
        wanted = functional_call(model, state, (images[b : b + 1],))[0]
        torch.testing.assert_close(together[b], wanted, atol=1e-4, rtol=1e-4)


def test_degenerate_experts_half_precision_and_inputs() -> None:
    _, base, experts = nets(dtype=torch.bfloat16)
    kept = copy.deepcopy((base, experts))
    for some in ([base] * 3, [base, experts[0]], [experts[0]] * 3, experts[:1], experts):
        found = wemoe(base, some)
        assert all(torch.isfinite(t).all() for t in (*found.static.values(), *found.vectors.vectors.values()))
        assert all(found.static[name].dtype == torch.bfloat16 for name in base)
        assert found.vectors.vectors[GATED[0]].dtype == torch.float32
    for state, before in zip((base, *experts), (kept[0], *kept[1]), strict=True):
        assert all(torch.equal(state[name], before[name]) for name in state)


def test_what_is_refused() -> None:
    _, base, experts = nets()
    with pytest.raises(ValueError, match=r"no weight matrix is gated by the patterns ffn(.|\n)*stem\.weight"):
        wemoe(base, experts, gated=["ffn"])
    with pytest.raises(ValueError, match="scale=inf"):
        wemoe(base, experts, scale=math.inf)
    for name, place in (("stem.bias", "stem"), (GATED[0], "c_fc")):
        broken = {n: t.clone() for n, t in experts[1].items()}
        broken[name].view(-1)[0] = math.nan
        with pytest.raises(ValueError, match=f"expert 1: .*{place}.* holds NaN"):
            wemoe(base, [experts[0], broken])
    with pytest.raises(IncompatibleCheckpoints, match=r"expert 0: stem\.bias is missing"):
        wemoe(base, [{name: tensor for name, tensor in experts[0].items() if name != "stem.bias"}])
    with pytest.raises(ValueError, match="free weights leave room by themselves"):
        Router(3, 2, null_expert=True, output="free")
