"""The compiled CPU kernel of the exact per-sample linear map, where the installation built one.

`cpu_kernel.cpp` is built with the package if a C++ compiler is there; without it, or for other dtypes and layouts,
`exact.py` runs the same tiles through torch. Legend: B batch, T tokens, I inputs, O outputs, K experts.
"""

from __future__ import annotations

from ctypes import CDLL, c_int64, c_void_p
from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["kernel_backward", "kernel_fits", "kernel_forward", "kernel_name"]

# By what torch itself found the processor to have, best first.
BUILDS = {"AVX2": ("avx2",), "AVX512": ("avx512", "avx2")}


def kernel_name() -> str:
    """Which build runs here: "avx512", "avx2", or "torch" for none."""
    return _library()[0]


def kernel_fits(x_BTI: Tensor, base_OI: Tensor, vectors_KOI: Tensor) -> bool:
    """Whether the kernel can run: CPU, float32 (task vectors also bfloat16), whole contiguous matrices."""
    return (
        all(t.device.type == "cpu" for t in (x_BTI, base_OI, vectors_KOI))
        and x_BTI.dtype == base_OI.dtype == torch.float32
        and vectors_KOI.dtype in (torch.float32, torch.bfloat16)
        and base_OI.is_contiguous()
        and vectors_KOI[0].is_contiguous()
        and _library()[1] is not None
    )


def kernel_forward(
    x_BTI: Float[Tensor, "B T I"],
    weights_BK: Float[Tensor, "B K"],
    base_OI: Float[Tensor, "O I"],
    vectors_KOI: Float[Tensor, "K O I"],
    bias_BO: Float[Tensor, "B O"] | None,
) -> Float[Tensor, "B T O"]:
    """y_b = x_b W_b^T + bias_b; bitwise the same for a sample whatever its batch and the number of threads."""
    library = _library()[1]
    assert library is not None
    x_BTI, weights_BK = x_BTI.contiguous(), weights_BK.contiguous()
    bias_BO = None if bias_BO is None else bias_BO.contiguous()
    y_BTO = x_BTI.new_empty(*x_BTI.shape[:2], len(base_OI))
    library.bd_merged_forward(
        *(None if t is None else t.data_ptr() for t in (x_BTI, weights_BK, base_OI, vectors_KOI, bias_BO, y_BTO)),
        *_sizes(x_BTI, vectors_KOI),
    )
    return y_BTO


def kernel_backward(
    x_BTI: Float[Tensor, "B T I"],
    weights_BK: Float[Tensor, "B K"],
    base_OI: Float[Tensor, "O I"],
    vectors_KOI: Float[Tensor, "K O I"],
    dy_BTO: Float[Tensor, "B T O"],
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Float[Tensor, "B T I"] | None, Float[Tensor, "B K"] | None]:
    """dx_b = dy_b W_b and dw_bk = <dy_b^T x_b, tau_k>, each if needed; dx is bitwise as the forward is."""
    library = _library()[1]
    assert library is not None
    x_BTI, weights_BK, dy_BTO = x_BTI.contiguous(), weights_BK.contiguous(), dy_BTO.contiguous()
    dx_BTI = torch.empty_like(x_BTI) if needs_x else None
    n_parts = library.bd_merged_parts(x_BTI.shape[2])
    parts_PBK = weights_BK.new_zeros(n_parts, *weights_BK.shape) if needs_weights else None
    tensors = (x_BTI, weights_BK, base_OI, vectors_KOI, dy_BTO, dx_BTI, parts_PBK)
    library.bd_merged_backward(*(None if t is None else t.data_ptr() for t in tensors), *_sizes(x_BTI, vectors_KOI))
    return dx_BTI, None if parts_PBK is None else parts_PBK.sum(0)


def _sizes(x_BTI: Tensor, vectors_KOI: Tensor) -> tuple[int, ...]:
    n_samples, n_tokens, n_inputs = x_BTI.shape
    n_experts, n_outputs, _ = vectors_KOI.shape
    is_half = int(vectors_KOI.dtype == torch.bfloat16)
    return n_samples, n_tokens, n_inputs, n_outputs, n_experts, vectors_KOI.stride(0), is_half


@cache
def _library() -> tuple[str, CDLL | None]:
    for build in BUILDS.get(torch.backends.cpu.get_cpu_capability(), ()):
        spec = find_spec(f"bd_core.merged._cpu_{build}")  # finds the file; it is no module that could be imported
        if spec is not None and spec.origin is not None:
            library = CDLL(spec.origin)
            if not hasattr(library, "bd_merged_forward"):  # built from an older source, and not since
                continue
            library.bd_merged_forward.argtypes = [c_void_p] * 6 + [c_int64] * 7
            library.bd_merged_forward.restype = None
            library.bd_merged_backward.argtypes = [c_void_p] * 7 + [c_int64] * 7
            library.bd_merged_backward.restype = None
            library.bd_merged_parts.argtypes = [c_int64]
            library.bd_merged_parts.restype = c_int64
            return build, library
    return "torch", None
