"""Low-rank per-sample linear maps: task vectors as factors, all of them in one pair of products.

Legend: B batch, T tokens, I inputs, O outputs, F = K R the inner widths of all experts.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from bd_core.merged.origin import Origin, origin_of

__all__ = ["low_rank_linear"]


def low_rank_linear(
    x_BTI: Float[Tensor, "B T I"],
    weights_BF: Float[Tensor, "B F"],
    base_IO: Float[Tensor, "I O"],
    first_FI: Float[Tensor, "F I"],
    second_FO: Float[Tensor, "F O"],
    bias_BO: Float[Tensor, "B O"] | None = None,
) -> Float[Tensor, "B T O"]:
    """y_b = x_b W_0 + ((x_b first^T) * w_b) second + bias_b.

    Differentiable in x, the weights and the bias. Backward takes x first^T anew where autograd keeps what x was
    computed from (`origin.py`), and keeps it otherwise: it is F wide, x is I wide.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x_BTI.device.type):
        inner_BTF = (x_BTI @ first_FI.T) * weights_BF[:, None]
        flat = torch.addmm(x_BTI.flatten(0, 1) @ base_IO, inner_BTF.flatten(0, 1), second_FO)
        y_BTO = flat.view(*x_BTI.shape[:2], -1)
        return y_BTO if bias_BO is None else y_BTO + bias_BO[:, None]
    operands = (x_BTI, weights_BF, base_IO, first_FI, second_FO, bias_BO)
    result: Tensor = _LowRankLinear.apply(*operands, origin_of(x_BTI))  # type: ignore[no-untyped-call]
    return result


class _LowRankLinear(torch.autograd.Function):
    """The same as one node, whose sums are made in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTI: Tensor,
        weights_BF: Tensor,
        base_IO: Tensor,
        first_FI: Tensor,
        second_FO: Tensor,
        bias_BO: Tensor | None,
        origin: Origin | None,
    ) -> Tensor:
        inner_BTF = x_BTI @ first_FI.T
        sources = (inner_BTF,) if origin is None else origin.sources
        ctx.save_for_backward(weights_BF, base_IO, first_FI, second_FO, *sources)
        ctx.origin = origin and origin.without_sources()
        y_BTO = x_BTI @ base_IO
        y_BTO.flatten(0, 1).addmm_((inner_BTF * weights_BF[:, None]).flatten(0, 1), second_FO)
        return y_BTO if bias_BO is None else y_BTO.add_(bias_BO[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTO: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weights = ctx.needs_input_grad[:2]
        weights_BF, base_IO, first_FI, second_FO, *sources = ctx.saved_tensors
        dy_BTO = dy_BTO.contiguous()
        dinner_BTF = dy_BTO @ second_FO.T
        dweights_BF = dx_BTI = None
        if needs_weights:
            inner_BTF = sources[0] if ctx.origin is None else ctx.origin.again(*sources) @ first_FI.T
            dweights_BF = (dinner_BTF * inner_BTF).sum(1)
        if needs_x:
            dx_BTI = dy_BTO @ base_IO.T
            dx_BTI.flatten(0, 1).addmm_(dinner_BTF.mul_(weights_BF[:, None]).flatten(0, 1), first_FI)
        dbias_BO = dy_BTO.sum(1) if ctx.needs_input_grad[5] else None
        return dx_BTI, dweights_BF, None, None, None, dbias_BO, None
