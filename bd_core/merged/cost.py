"""Which exact form of a per-sample linear map is cheaper: tiles of merged weights, or activations through all matrices.

A sample's cost in nanoseconds of one core for an element of the matrix, with T tokens and K experts:

    tiles     K form + T multiply
    stacked   (1 + K) T stacked

The matrix's shape cancels, since both forms touch every element alike; both read W_0 and the task vectors once for many
samples. The batch is left out on purpose: were the form chosen by it, a sample's last bits would depend on its batch.
For the same reason the rates are constants and not measured at run time; `python -m infra.bench.bench_costs` measures
them.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CPU", "CUDA", "Costs", "stacked_is_cheaper"]


@dataclass(frozen=True)
class Costs:
    """Nanoseconds an element of the matrix: only their ratios decide."""

    form: float
    multiply: float
    stacked: float


CPU = Costs(form=0.053, multiply=0.030, stacked=0.030)  # two cores, AVX2
# Not measured: from the H200's data sheet, bf16 products on tensor cores (990 TFLOP/s), other arithmetic at 67 TFLOP/s.
CUDA = Costs(form=3e-5, multiply=2e-6, stacked=2e-6)


def stacked_is_cheaper(n_tokens: int, n_experts: int, costs: Costs) -> bool:
    """Whether K + 1 products of the activations cost less than forming every sample's matrix."""
    tiles = n_experts * costs.form + n_tokens * costs.multiply
    return (1 + n_experts) * n_tokens * costs.stacked < tiles
