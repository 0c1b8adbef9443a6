"""One side of a comparison of merging methods: answers requests, one JSON line each, in its own environment.

    python -m infra.bench.peers.worker ours|fusionbench|mergekit

`{"do": "states", "layers": 2, "experts": 8}` makes the checkpoints: the shapes of open_clip's ViT-B-32, the first
`layers` blocks of each tower, random numbers that are the same in every environment. `{"do": "merge", ...}` merges
them once and answers seconds, peak memory beyond what was resident before, and a sample of the result.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import resource
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
VISION, TEXT, VOCABULARY = 768, 512, 49408
PROBED = 64  # entries of every tensor that are sent back


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """open_clip's names and shapes, cut to this many blocks a tower; 12 is the whole ViT-B-32."""
    found: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, TEXT),
        "text_projection": (TEXT, TEXT),
        "logit_scale": (),
        "visual.class_embedding": (VISION,),
        "visual.positional_embedding": (50, VISION),
        "visual.proj": (VISION, TEXT),
        "visual.conv1.weight": (VISION, 3, 32, 32),
        "visual.ln_pre.weight": (VISION,),
        "visual.ln_pre.bias": (VISION,),
    }
    for tower, width in (("visual.transformer", VISION), ("transformer", TEXT)):
        for layer in range(layers):
            block = f"{tower}.resblocks.{layer}"
            for name, rows, columns in (
                ("attn.in_proj_", 3 * width, width),
                ("attn.out_proj.", width, width),
                ("mlp.c_fc.", 4 * width, width),
                ("mlp.c_proj.", width, 4 * width),
            ):
                found[f"{block}.{name}weight"] = (rows, columns)
                found[f"{block}.{name}bias"] = (rows,)
            for name in ("ln_1", "ln_2"):
                found |= {f"{block}.{name}.weight": (width,), f"{block}.{name}.bias": (width,)}
    found |= {"visual.ln_post.weight": (VISION,), "visual.ln_post.bias": (VISION,)}
    return found | {"token_embedding.weight": (VOCABULARY, TEXT), "ln_final.weight": (TEXT,), "ln_final.bias": (TEXT,)}


def states(layers: int, n_experts: int) -> tuple[State, list[State]]:
    """The base and its experts; norms of the task vectors differ as they do between tasks."""
    base: State = {}
    experts: list[State] = [{} for _ in range(n_experts)]
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes(layers).items():
        base[name] = 0.05 * torch.randn(shape, generator=generator)
        for k, expert in enumerate(experts):
            step = torch.randn(shape, generator=generator)
            expert[name] = step.mul_(0.001 * (1 + 0.2 * (k % 5))).add_(base[name])
    return base, experts


def main() -> None:
    """Answers until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=("ours", "fusionbench", "mergekit"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-bytes", type=int, default=0, help="refuse to allocate more than this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (options.memory_bytes, options.memory_bytes))
    prepare = _preparer(options.side)
    base: State = {}
    experts: list[State] = []
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "states":
                base, experts = {}, []
                base, experts = states(request["layers"], request["experts"])
                answer: dict[str, Any] = {"model_bytes": sum(t.nbytes for t in base.values())}
            else:
                used = experts[: request.get("experts", len(experts))]
                answer = measured(prepare, request["method"], request["parameters"], base, used)
        except (MemoryError, RuntimeError) as error:
            if "alloc" not in str(error) and not isinstance(error, MemoryError):
                raise
            answer = {"failed": "out of memory"}
        sys.__stdout__.write(json.dumps(answer) + "\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]


def measured(
    prepare: Callable[..., Callable[[], State]],
    method: str,
    parameters: dict[str, Any],
    base: State,
    experts: list[State],
) -> dict[str, Any]:
    """One merge: seconds, peak bytes beyond the inputs (None where the kernel does not tell), sampled steps."""
    before = [float(tensor.sum()) for state in (base, *experts) for tensor in islice(state.values(), 8)]
    run = prepare(method, base, experts, **parameters)
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # memory kept from an earlier merge must count when this one takes it
    resident = _reset_peak()
    start = time.perf_counter()
    merged = run()
    seconds = time.perf_counter() - start
    peak = None if resident is None else _status_bytes("VmHWM") - resident
    after = [float(tensor.sum()) for state in (base, *experts) for tensor in islice(state.values(), 8)]
    assert before == after, f"{method} changed its inputs"
    steps = [_sample(merged[name], base[name]) for name in base]
    return {"seconds": seconds, "peak_bytes": peak, "steps": torch.cat(steps).tolist()}


def _sample(merged: Tensor, origin: Tensor) -> Tensor:
    stride = max(1, origin.numel() // PROBED)
    return merged.detach().flatten()[::stride][:PROBED] - origin.flatten()[::stride][:PROBED]


def _preparer(side: str) -> Callable[..., Callable[[], State]]:
    """How this side gets ready to merge; what it must copy to leave the inputs alone is no part of the merge."""
    if side == "ours":
        from bd_core.methods import merge

        return lambda method, base, experts, **parameters: lambda: merge(method, base, experts, **parameters)
    if side == "mergekit":
        from infra.bench.peers import mergekit

        return mergekit.prepared
    from infra.bench.peers import fusionbench

    def prepared(method: str, base: State, experts: list[State], **parameters: Any) -> Callable[[], State]:
        # It writes into the pretrained model or the first expert, and replaces the tensors of the others.
        own = [{name: tensor.clone() for name, tensor in state.items()} for state in (base, experts[0])]
        return fusionbench.prepared(method, own[0], [own[1], *experts[1:]], **parameters)

    return prepared


def _reset_peak() -> int | None:
    """Resident bytes now, the high-water mark brought down to them; None where that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _status_bytes("VmRSS")
    except OSError:
        return None


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


if __name__ == "__main__":
    main()
