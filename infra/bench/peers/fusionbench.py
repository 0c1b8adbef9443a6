"""FusionBench on plain state dicts. Runs in an environment of its own, never one of the project's.

python3.11 -m venv peers-fusionbench
peers-fusionbench/bin/pip install torch==2.13.0
peers-fusionbench/bin/pip install fusion-bench==0.2.33
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

PACKAGE = "fusion-bench"
VERSION = version(PACKAGE)
# Our method's name: the peer's class and the arguments that mean our defaults.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "weight_average": ("SimpleAverageAlgorithm", {}),
    "task_arithmetic": ("TaskArithmeticAlgorithm", {"scaling_factor": 0.3}),
    "ties": (
        "TiesMergingAlgorithm",
        {"scaling_factor": 0.3, "threshold": 20, "merge_func": "sum", "remove_keys": []},
    ),
    "dare": (
        "DareTaskArithmetic",
        {"scaling_factor": 0.3, "sparsity_ratio": 0.5, "only_on_linear_weights": False, "rescale": True},
    ),
    "dare_ties": (
        "DareTiesMerging",
        {
            "scaling_factor": 0.3,
            "sparsity_ratio": 0.5,
            "only_on_linear_weights": False,
            "rescale": True,
            "threshold": 20,
            "merge_func": "sum",
            "remove_keys": [],
        },
    ),
    "model_stock": ("ModelStock", {}),
    "tsv_m": ("TaskSingularVectorMerging", {}),
    "iso_c": ("ISO_C_Merge", {"scaling_factor": 1.0}),
    "wudi": ("WUDIMerging", {"iter_num": 300}),
    "doge": ("DOGE_TA_Algorithm", {"subspace": 6, "K": 30, "lamda": 0.07}),
}
# Their data-free matrix methods take every two-dimensional tensor unless its key is given here.
TAKES_EXCLUDED = ("tsv_m", "iso_c", "wudi")


def as_module(state: Mapping[str, Tensor]) -> nn.Module:
    """A module whose state dict has these keys and shares these tensors; floating ones are parameters."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if tensor.is_floating_point():
            owner.register_parameter(leaf, nn.Parameter(tensor))
        else:
            owner.register_buffer(leaf, tensor)
    return root


def prepared(
    method: str, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], **parameters: Any
) -> Callable[[], dict[str, Tensor]]:
    """One merge, ready to be called once: it works in place, so the tensors given here are its own afterwards."""
    import fusion_bench.method
    from fusion_bench.modelpool import BaseModelPool

    title, defaults = METHODS[method]
    algorithm = getattr(fusion_bench.method, title)
    pool = BaseModelPool(
        {"_pretrained_": as_module(base)} | {f"expert{k}": as_module(expert) for k, expert in enumerate(experts)}
    )
    ready = algorithm(**(defaults | parameters))

    def run() -> dict[str, Tensor]:
        with quiet():
            merged = ready.run(pool)
        return {name: tensor.detach() for name, tensor in merged.state_dict().items()}

    return run


def merged(
    method: str, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], **parameters: Any
) -> dict[str, Tensor]:
    """The merged state dict; the inputs are left as they are."""
    copies = [{name: tensor.clone() for name, tensor in state.items()} for state in (base, *experts)]
    return prepared(method, copies[0], copies[1:], **parameters)()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Its progress bars and prints swallowed."""
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
