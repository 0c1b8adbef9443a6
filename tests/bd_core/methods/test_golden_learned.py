"""Methods that learn or cut, against golden tensors of FusionBench 0.2.33; see test_golden_static."""

from __future__ import annotations

import torch
from golden.read_golden import LEARNED, N_SEEN, TASKS, State, read_golden, read_inputs
from golden_agreement import assert_agrees
from torch import Tensor
from torch.nn import functional as F

from bd_core.compression import svd_compress
from bd_core.methods.adamerging import adamerging
from bd_core.methods.doge import doge
from bd_core.methods.regmean import regmean
from bd_core.methods.surgery import Surgery
from bd_core.task_vectors import task_vectors


def logits(parameters: State, batch: Tensor, task: str) -> Tensor:
    """The small classifier of the golden case."""
    fc1, bias1, fc2, bias2, head = (parameters[name] for name in LEARNED.values())
    scores = F.linear(F.linear(F.relu(F.linear(batch, fc1, bias1)), fc2, bias2), head)
    return scores.roll(TASKS.index(task), dims=1)[:, :N_SEEN]


def test_adamerging() -> None:
    """Six steps of layer-wise AdaMerging: coefficients and merged weights.

    FusionBench keeps all tasks' graphs until the step, ours takes one task after another: the same gradient. Its
    entropy has log(p + 1e-8), ours log p.
    """
    inputs = read_inputs()
    base = {name: inputs.base[name] for name in LEARNED.values()}
    experts = [{name: expert[name] for name in base} for expert in inputs.experts]
    golden = read_golden("fb_adamerging")
    steps = golden.facts["parameters"]["max_steps"]
    batches = [{task: inputs.batches[task][step] for task in TASKS} for step in range(steps)]
    found = adamerging(
        base, experts, logits=logits, batches=batches, steps=steps, learning_rate=1e-2, initial=0.3, tolerance=0.0
    )
    assert found.names == tuple(base)
    coefficients = golden.tensors.pop("coefficients")
    torch.testing.assert_close(found.coefficients.T, coefficients, rtol=1e-5, atol=0)
    for name, peer in golden.tensors.items():
        assert float((found.merged[name] - peer).norm() / (peer - base[name]).norm()) <= 1e-5, name


def test_doge() -> None:
    """400 steps of gradient descent end at the same place.

    FusionBench picks its matrices by Hugging Face names ("encoder" and "weight"), so the golden case's matrices are
    those of the encoder, and everything else is left as the base has it.
    """
    inputs = read_inputs()
    encoder = {name: tensor for name, tensor in inputs.base.items() if name.startswith("encoder")}
    merged = dict(doge(encoder, inputs.experts))
    rest = {name: tensor for name, tensor in inputs.base.items() if name not in encoder}
    assert_agrees(merged | rest, "fb_doge", inputs.base)


def test_low_rank_cut_of_twin_merging() -> None:
    """FusionBench has no Twin-Merging, but the cut of a task vector to its leading singular triplets."""
    inputs = read_inputs()
    golden = read_golden("fb_low_rank")
    name = "encoder.layers.0.self_attn.in_proj.weight"
    vectors = task_vectors({name: inputs.base[name]}, [{name: expert[name]} for expert in inputs.experts])
    cut = svd_compress(vectors, rank=golden.facts["parameters"]["k"]).expanded().vectors[name]
    for k, peer in enumerate(golden.tensors.values()):
        assert float((cut[k] - peer).norm() / peer.norm()) <= 1e-5


def test_regmean() -> None:
    """FusionBench's closed form on Gram matrices of the same activations, off-diagonals shrunk by 0.9."""
    inputs = read_inputs()
    golden = read_golden("fb_regmean")
    share = 1 - golden.facts["parameters"]["reduce_non_diagonal_ratio"]
    grams = {name: x.mT @ x / x.shape[1] for name, x in inputs.activations.items()}
    merged = dict(regmean(inputs.base, inputs.experts, grams=grams, diagonal_share=share))
    assert_agrees(merged, "fb_regmean", inputs.base)


def test_surgery() -> None:
    """One task's module, started where FusionBench's starts: the same features and the same twelve steps."""
    inputs = read_inputs()
    golden = read_golden("fb_surgery")
    settings, peer = golden.facts["parameters"], golden.tensors
    module = Surgery(TASKS[:1], settings["projection_dim"], rank=settings["hidden_dim"])
    module.load_state_dict({"down": peer["down.start"][None], "up": peer["up.start"][None]})
    optimiser = torch.optim.Adam(module.parameters(), lr=settings["lr"])
    name = "encoder.layers.0.self_attn.out_proj.weight"
    merged, far = inputs.base[name], inputs.base[name] + 20 * (inputs.experts[3][name] - inputs.base[name])
    batches = inputs.batches[TASKS[0]]
    for step in range(settings["steps"]):
        batch = batches[step % len(batches)]
        loss = F.l1_loss(module(batch @ merged.T, TASKS[0]), batch @ far.T)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.testing.assert_close(module.down[0], peer["down"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.up[0], peer["up"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module(batches[0] @ merged.T, TASKS[0]), peer["features"], rtol=1e-5, atol=1e-6)
