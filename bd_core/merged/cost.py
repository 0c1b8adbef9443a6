"""Which exact form of a per-sample linear map is cheaper: tiles of merged weights, or activations through all matrices.

The cost of a call in nanoseconds, with B samples of T tokens, K experts, a matrix of O x I elements of s bytes:

    read      (1 + K) O I s read                                    W_0 and the task vectors, once for the batch
    tiles     call_tiles   + max(read, B O I (K form + T multiply))
    stacked   call_stacked + max(read, B O I (1 + K) T stacked) + 2 (1 + K) B T O s read

Arithmetic hides behind reading or the other way round; the last term writes and reads what every matrix gives. The
rates are constants, measured once by `python -m infra.bench.bench_costs`, and not taken at run time: the same batch
takes the same form everywhere. Another batch may take the other form, where a sample's result is equal up to rounding
(1e-6); that happens for one or two tokens only, since many tokens never stack.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CPU", "CUDA", "Call", "Costs", "stacked_is_cheaper"]


@dataclass(frozen=True)
class Call:
    """One per-sample linear map: what its cost depends on."""

    n_samples: int
    n_tokens: int
    n_experts: int
    n_outputs: int
    n_inputs: int
    element_bytes: int = 4


@dataclass(frozen=True)
class Costs:
    """Nanoseconds of the whole machine: by element of a sample's matrix, by byte read, by call."""

    form: float
    multiply: float
    stacked: float
    read: float
    call_tiles: float
    call_stacked: float


# Two cores, AVX2, task vectors in huge pages: the median of five runs of bench_costs on an idle machine.
CPU = Costs(form=0.030, multiply=0.018, stacked=0.0176, read=0.035, call_tiles=54e3, call_stacked=80e3)
# Not measured: from the H200's data sheet, bf16 products on tensor cores (990 TFLOP/s), other arithmetic at 67 TFLOP/s,
# memory at 4.8 TB/s; a launch at 5 us.
CUDA = Costs(form=3e-5, multiply=2e-6, stacked=2e-6, read=2.1e-4, call_tiles=15e3, call_stacked=20e3)


def stacked_is_cheaper(call: Call, costs: Costs) -> bool:
    """Whether K + 1 products of the activations cost less than forming every sample's matrix."""
    matrices, size = 1 + call.n_experts, call.n_outputs * call.n_inputs
    read = matrices * size * call.element_bytes * costs.read
    forming = call.n_samples * size * (call.n_experts * costs.form + call.n_tokens * costs.multiply)
    products = call.n_samples * size * matrices * call.n_tokens * costs.stacked
    results = 2 * matrices * call.n_samples * call.n_tokens * call.n_outputs * call.element_bytes * costs.read
    tiles = costs.call_tiles + max(read, forming)
    return costs.call_stacked + max(read, products) + results < tiles
