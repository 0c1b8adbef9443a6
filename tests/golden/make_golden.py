"""Writes the golden tensors beside this file: what FusionBench and mergekit make of the same few checkpoints.

    peers-fusionbench/bin/python -m tests.golden.make_golden inputs
    peers-fusionbench/bin/python -m tests.golden.make_golden fusionbench
    peers-mergekit/bin/python -m tests.golden.make_golden mergekit

Each runs in its peer's own environment (infra/bench/peers says how to make one), from the repository's root; the tests
need neither. `golden.json` lists every case: the peer, its version, the method as it calls it and the parameters.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.golden.read_golden import HERE, LEARNED, N_EXPERTS, N_SEEN, SHAPES, TASKS, State, read_inputs

KEEP = 0.5  # of the DARE masks
TABLE = "embeddings.position_embedding.weight"  # two-dimensional, but multiplies no activation
# The linear layers that activations are stored for.
WITH_INPUTS = ("encoder.layers.0.mlp.fc1.weight", "encoder.layers.0.mlp.fc2.weight")
STEPS = 6


def main() -> None:
    """One of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("inputs", "fusionbench", "mergekit"))
    part = parser.parse_args().part
    if part == "inputs":
        save_file(inputs(), HERE / "inputs.safetensors")
        return
    found = list(fusionbench_cases() if part == "fusionbench" else mergekit_cases())
    # One flat tensor a case: the names in the file's header would be half of it.
    tensors = {case: torch.cat([tensor.flatten() for tensor in state.values()]) for case, _, state in found}
    save_file(tensors, HERE / f"{part}.safetensors")
    path = HERE / "golden.json"
    listed = json.loads(path.read_text()) if path.exists() else {}
    kept = {case: facts for case, facts in listed.items() if facts["file"] != f"{part}.safetensors"}
    own = {
        case: {"file": f"{part}.safetensors", **facts, "tensors": {name: list(t.shape) for name, t in state.items()}}
        for case, facts, state in found
    }
    for facts in own.values():
        if facts["tensors"] == {name: list(shape) for name, shape in SHAPES.items()}:
            facts["tensors"] = "all"
    path.write_text(json.dumps(dict(sorted((kept | own).items())), indent=1) + "\n")


def inputs() -> State:
    """The base, four experts whose task vectors agree a little and have unlike norms, activations, batches, masks."""
    generator = torch.Generator().manual_seed(20261122)
    randn = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    tensors: State = {f"base/{name}": 0.3 * randn(*shape) for name, shape in SHAPES.items()}
    shared = {name: 0.7 * randn(*shape) for name, shape in SHAPES.items()}
    for k in range(N_EXPERTS):
        for name, shape in SHAPES.items():
            step = 0.01 * (1 + 0.5 * k) * (shared[name] + randn(*shape))
            if len(shape) == 2:
                step *= torch.logspace(0.5, -0.5, shape[1])
            tensors[f"expert{k}/{name}"] = tensors[f"base/{name}"] + step
        for name in SHAPES:
            tensors[f"mask{k}/{name}"] = torch.rand(SHAPES[name], generator=generator) < KEEP
    for name in WITH_INPUTS:
        scale = torch.logspace(0.3, -0.3, SHAPES[name][1])
        tensors[f"activations/{name}"] = randn(N_EXPERTS, 16, SHAPES[name][1]) * scale
    for task in TASKS:
        tensors[f"batches/{task}"] = randn(STEPS, 8, SHAPES["encoder.layers.0.mlp.fc1.weight"][1])
    return tensors


Case = tuple[str, dict[str, Any], State]


def fusionbench_cases() -> Iterator[Case]:
    """(case, facts, merged state) of everything FusionBench has among our methods."""
    from infra.bench.peers import fusionbench as peer

    read = read_inputs()
    base, experts, masks = read.base, read.experts, read.masks
    where = {"peer": peer.PACKAGE, "version": peer.VERSION}

    def case(title: str, method: str, *, used: list[State] = experts, **parameters: Any) -> Case:
        torch.manual_seed(0)
        state = peer.merged(method, base, used, **parameters)
        facts = {**where, "method": peer.METHODS[method][0], "parameters": peer.METHODS[method][1] | parameters}
        return title, {**facts, "experts": len(used)}, {name: state[name] for name in SHAPES}

    yield case("fb_weight_average", "weight_average")
    yield case("fb_task_arithmetic", "task_arithmetic")
    yield case("fb_ties_sum", "ties")
    yield case("fb_ties_mean", "ties", merge_func="mean")
    ordered = [mask[name] for mask in masks for name in named(peer.as_module(base))]
    with handed_over("rand_like", [mask.float() for mask in ordered]):  # kept where the number exceeds the share
        yield case("fb_dare", "dare")
    with handed_over("rand_like", [mask.float() for mask in ordered]):
        yield case("fb_dare_ties", "dare_ties")
    yield case("fb_model_stock", "model_stock")
    yield case("fb_model_stock_two", "model_stock", used=experts[:2])
    yield case("fb_tsv_m", "tsv_m", exclude_keys=[TABLE])
    yield case("fb_tsv_m_three", "tsv_m", used=experts[:3], exclude_keys=[TABLE])
    yield case("fb_iso_c", "iso_c", exclude_keys=[TABLE])
    yield case("fb_wudi", "wudi", exclude_keys=[TABLE])
    yield case("fb_doge", "doge")
    yield "fb_regmean", *_regmean(where, experts, read.activations)
    yield "fb_adamerging", *_adamerging(where, base, experts, read.batches)
    yield "fb_surgery", *_surgery(where, base, experts, read.batches)
    yield "fb_low_rank", *_low_rank(where, base, experts)


def mergekit_cases() -> Iterator[Case]:
    """(case, facts, merged state) of everything mergekit has among our methods."""
    from infra.bench.peers import mergekit as peer

    read = read_inputs()
    base, experts, masks = read.base, read.experts, read.masks
    where = {"peer": peer.PACKAGE, "version": peer.VERSION}

    def case(title: str, method: str, *, half: bool = False, used: list[State] = experts, **parameters: Any) -> Case:
        states = [{name: tensor.bfloat16() if half else tensor for name, tensor in s.items()} for s in (base, *used)]
        merged = peer.merged(method, states[0], states[1:], **parameters)
        facts = {**where, "method": peer.METHODS[method][0], "parameters": peer.METHODS[method][1] | parameters}
        state = {name: merged[name] for name in SHAPES}
        return title, {**facts, "experts": len(used), "dtype": "bfloat16" if half else "float32"}, state

    yield case("mk_weight_average", "weight_average")
    yield case("mk_weight_average_bf16", "weight_average", half=True)
    yield case("mk_task_arithmetic", "task_arithmetic")
    yield case("mk_task_arithmetic_bf16", "task_arithmetic", half=True)
    yield case("mk_ties_sum", "ties")
    # Normalised, the agreeing entries are averaged and only then scaled.
    yield case("mk_ties_mean", "ties", weight=1.0, normalize=True, **{"lambda": 0.3})
    ordered = [mask[name].float() for name in SHAPES for mask in masks]
    with handed_over("bernoulli", ordered):
        yield case("mk_dare", "dare")
    with handed_over("bernoulli", ordered):
        yield case("mk_dare_sign", "dare_ties")
    yield case("mk_model_stock", "model_stock")
    yield case("mk_model_stock_two", "model_stock", used=experts[:2])


def named(module: nn.Module) -> list[str]:
    """The parameters' names in the order the module walks them."""
    return [name for name, _ in module.named_parameters()]


@contextlib.contextmanager
def handed_over(function: str, answers: list[Tensor]) -> Iterator[None]:
    """The peer's source of randomness answers these tensors, in this order, and every one is asked for."""
    left = list(answers)

    def answer(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        following = left.pop(0)
        assert following.shape == tensor.shape, (following.shape, tensor.shape)
        return following.to(tensor.dtype)

    with mock.patch.object(torch, function, answer):
        yield
    assert not left, f"{len(left)} masks were not asked for"


def _regmean(where: dict[str, str], experts: list[State], activations: State) -> tuple[dict[str, Any], State]:
    """Their closed form on Gram matrices of the stored activations; their collection of them needs a CLIP trainer."""
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    ratio = 0.9
    grams = [
        {name.removesuffix(".weight"): x[k].T @ x[k] / len(x[k]) for name, x in activations.items()}
        for k in range(N_EXPERTS)
    ]
    lists = {name: [expert[name] for expert in experts] for name in activations}
    merged = merging_with_regmean_weights(lists, grams, reduce_non_diagonal_ratio=ratio)
    facts = {"method": "merging_with_regmean_weights", "parameters": {"reduce_non_diagonal_ratio": ratio}}
    return {**where, **facts, "experts": N_EXPERTS}, merged


class Learner(nn.Module):
    """The small classifier whose parameters are those of `LEARNED`."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(10, 14), nn.Linear(14, 10), nn.Linear(10, 7, bias=False)
        self.load_state_dict({own: state[name] for own, name in LEARNED.items()})

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.fc2(F.relu(self.fc1(x))))
        return logits


def _adamerging(
    where: dict[str, str], base: State, experts: list[State], batches: State
) -> tuple[dict[str, Any], State]:
    """Six steps of their layer-wise AdaMerging: the coefficients [K, P] and the merged parameters."""
    from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
    from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel, get_layer_wise_weights
    from omegaconf import DictConfig

    from infra.bench.peers.fusionbench import quiet

    settings = {"weights": None, "init_values": 0.3, "clamp_weights": True, "tie_weights": True, "strict": True}
    settings |= {"optimizer": "adam", "lr": 1e-2, "max_steps": STEPS}

    streams = {task: iter([(batch,) for batch in batches[task]]) for task in TASKS}

    class Adapted(LayerWiseAdaMergingAlgorithm):
        modelpool = mock.Mock(model_names=TASKS)

        def get_shuffled_test_loader_iter(self, task: str) -> Iterator[tuple[Tensor]]:
            return streams[task]

        def compute_logits(self, module: nn.Module, images: Tensor, task: str) -> Tensor:
            logits: Tensor = module(images)
            return logits.roll(TASKS.index(task), dims=1)[:, :N_SEEN]

    learners = [Learner(state) for state in (base, *experts)]
    weights = get_layer_wise_weights(len(experts), len(LEARNED), settings["init_values"])
    module = LayerWiseMergedModel(weights, learners[0], learners[1:], clamp_weights=True, tie_weights=True)
    algorithm = Adapted(DictConfig(settings))
    with quiet(), mock.patch.object(Adapted, "log_hyperparams", lambda *_: None):
        adapted = algorithm.test_time_adaptation(module)
        merged = adapted.merge_and_unload().state_dict()
    state = {name: merged[own] for own, name in LEARNED.items()}
    state["coefficients"] = adapted.merge_weight.detach().clone()
    facts = {"method": "LayerWiseAdaMergingAlgorithm", "parameters": settings, "experts": len(experts)}
    return {**where, **facts}, {name: tensor.detach() for name, tensor in state.items()}


def _surgery(where: dict[str, str], base: State, experts: list[State], batches: State) -> tuple[dict[str, Any], State]:
    """Their surgery of one task's features: where it starts, where twelve steps of L1 loss lead, and its features."""
    from transformers.models.clip import modeling_clip

    # Their module imports a name for an annotation that newer transformers have dropped.
    with mock.patch.object(modeling_clip, "CLIPVisionTransformer", nn.Module, create=True):
        from fusion_bench.models.surgery.surgerymodelwrapper import SurgeryModelWrapper

    width, rank = 10, 4
    torch.manual_seed(0)
    wrapper = SurgeryModelWrapper(nn.Identity(), [TASKS[0]], projection_dim=width, hidden_dim=rank)
    down, up = wrapper.collect_trainable_params()
    start = {"down.start": down.detach().clone(), "up.start": up.detach().clone()}
    optimiser = torch.optim.Adam([down, up], lr=1e-2)
    weight = "encoder.layers.0.self_attn.out_proj.weight"
    for step in range(2 * STEPS):
        batch = batches[TASKS[0]][step % STEPS]
        features, _, _ = wrapper.compute_surgery_features(batch @ base[weight].T, TASKS[0])
        loss = F.l1_loss(features, batch @ (base[weight] + 20 * (experts[3][weight] - base[weight])).T)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        features, _, _ = wrapper.compute_surgery_features(batches[TASKS[0]][0] @ base[weight].T, TASKS[0])
    found = start | {"down": down.detach(), "up": up.detach(), "features": features}
    parameters = {
        "projection_dim": width,
        "hidden_dim": rank,
        "lr": 1e-2,
        "steps": 2 * STEPS,
        "target": "expert 3 at 20",
    }
    return {**where, "method": "SurgeryModelWrapper", "parameters": parameters, "experts": 1}, found


def _low_rank(where: dict[str, str], base: State, experts: list[State]) -> tuple[dict[str, Any], State]:
    """Their cut of one weight to its leading singular triplets, as Twin-Merging needs it: one matrix an expert."""
    from fusion_bench.models.smile_moe.linear_from_module import SmileCompressedLinear

    name, rank = "encoder.layers.0.self_attn.in_proj.weight", 2
    cut: State = {}
    for k, expert in enumerate(experts):
        linear = nn.Linear(10, 30, bias=False)
        linear.weight.data = expert[name] - base[name]
        cut[f"expert{k}.{name}"] = SmileCompressedLinear(linear, rank)(torch.eye(10)).T.detach()
    facts = {"method": "SmileCompressedLinear", "parameters": {"k": rank}, "experts": len(experts)}
    return {**where, **facts}, cut


if __name__ == "__main__":
    main()
