"""The merged model: one forward pass, every sample through its own merge.

Legend: B batch, G layer groups, K experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bd_core.compression import CompressedVectors
from bd_core.merged.convert import Converter, skeleton
from bd_core.merged.exact import BUDGET_BYTES
from bd_core.merged.fallback import VmapModule, merged_parameters
from bd_core.merged.fit import check_fit, count_groups
from bd_core.merged.outputs import reordered
from bd_core.merged.routing import NoBatchedForm, Routing, shared_copies
from bd_core.merged.tensors import LowRankTensor, MergedTensor
from bd_core.merged.verify import disagreement
from bd_core.task_vectors import LayerGroups, TaskVectors, task_vectors

__all__ = ["MergedModel"]


class MergedModel(nn.Module):
    """A model whose every sample b runs with theta(x_b) = theta_0 + sum_k w_bk tau_k.

    BD-Merging, stage 2. Exact; differentiable in the weights and the inputs, never in parameters (it has none: base
    and task vectors are non-persistent buffers, shared with what was passed in, so that `.to()` moves them and a
    state dict stays free of them). Always in evaluation mode: dropout and batch statistics would tie a sample to its
    batch. The model passed in gives its structure only and is never modified.

    Linear, Conv2d, Embedding, normalisations, MultiheadAttention and open_clip's vision transformer run in batched
    forms; other modules through `torch.func`, with equal results, and `fallback_reason` says which and why. Batched
    forms assume that activations carry the sample first. With `verify`, the first batch of two or more samples is
    compared with explicitly merged copies (one copy of the parameters for a moment); a model that uses its
    parameters in an unforeseen way runs through `torch.func` as a whole from then on.

    Modes (default: the first, or the second for compressed vectors):
    - `exact`: every sample's own weights, formed tile by tile and dropped.
    - `low_rank`: compressed task vectors are multiplied by as factors; `relative_error` holds each parameter's cut.
    - `grouped` (ours), for inference: samples whose weights lie within `max_distance` share one merged copy, as long
      as the copies are few (at most a quarter of the samples); otherwise, and in training, exact.
      `weight_error_bound` says how far a parameter can lie from a sample's own. A result then depends on its batch.
    """

    relative_error: dict[str, float]

    def __init__(
        self,
        model: nn.Module,
        base: Mapping[str, Tensor],
        experts: Sequence[Mapping[str, Tensor]] | TaskVectors | CompressedVectors,
        groups: LayerGroups | Mapping[str, int] | None = None,
        *,
        mode: Literal["exact", "low_rank", "grouped"] | None = None,
        max_distance: float = 0.05,
        budget_bytes: int = BUDGET_BYTES,
        vectors_dtype: torch.dtype | None = None,
        verify: bool = True,
    ) -> None:
        """`groups` maps every merged name to its layer group (default: one group).

        `max_distance` of mode "grouped" is the largest sum_k |w_bk - w_ck| over layer groups. `budget_bytes` bounds
        what a linear layer needs beyond its input, its parameters and its output, whatever the batch.
        `vectors_dtype` is the dtype in which dense task vectors of matrices and kernels are held (default: the base's):
        bfloat16 halves their memory and rounds them once; they are widened tile by tile.
        Raises ValueError naming the parameter if model, base and experts do not fit.
        """
        super().__init__()
        vectors = experts if isinstance(experts, (TaskVectors, CompressedVectors)) else task_vectors(base, experts)
        self.mode = mode or ("low_rank" if isinstance(vectors, CompressedVectors) else "exact")
        self.relative_error = vectors.relative_error if isinstance(vectors, CompressedVectors) else {}
        if self.mode not in ("exact", "low_rank", "grouped"):
            raise ValueError(f"mode is {self.mode!r}, expected 'exact', 'low_rank' or 'grouped'")
        if self.mode == "low_rank" and not isinstance(vectors, CompressedVectors):
            raise ValueError("mode 'low_rank' needs compressed task vectors: give svd_compress(vectors, rank=...)")
        if self.mode != "low_rank" and isinstance(vectors, CompressedVectors):
            vectors = vectors.expanded()
        if vectors_dtype is not None and not vectors_dtype.is_floating_point:
            raise ValueError(f"vectors_dtype is {vectors_dtype}, needs a floating-point dtype such as torch.bfloat16")
        if budget_bytes < 1:
            raise ValueError(f"budget_bytes is {budget_bytes}, needs at least 1; the default is {BUDGET_BYTES}")
        check_fit(model, base, vectors)
        names = vectors.shapes if isinstance(vectors, CompressedVectors) else vectors.vectors
        index = groups.index if isinstance(groups, LayerGroups) else dict(groups or dict.fromkeys(names, 0))
        self.n_groups = count_groups(index, names, groups)
        self.max_distance = max_distance
        self.routing = Routing(budget_bytes)
        tensors = {
            name: _merged_tensor(name, base[name], vectors, index[name], self.routing, vectors_dtype) for name in names
        }
        self.n_experts = vectors.n_experts
        constants = {name: tensor.detach() for name, tensor in base.items() if name not in tensors}
        self.reference = VmapModule(skeleton(model), tensors, constants)
        converter = Converter(tensors, constants)
        self.model = converter.convert(skeleton(model))
        self.injected = converter.injected
        self.fallback_reason: str | None = "; ".join(converter.reasons) or None
        self._unverified = verify and not isinstance(self.model, VmapModule)
        self.eval()

    def train(self, mode: bool = True) -> MergedModel:
        """Itself, still in evaluation mode (see the class)."""
        return super().train(False)

    def forward(self, *inputs: Any, weights: Float[Tensor, "B K"] | Float[Tensor, "B G K"], **shared: Any) -> Any:
        """The model's output for a batch; row b of `weights` merges sample b.

        Positional tensors carry the samples first; keyword arguments are shared by all. Weights [B, K] and [B, 1, K]
        hold for every layer group. Raises ValueError for an empty batch, weights of another shape or not finite.
        """
        weights_BGK = self._checked(inputs, weights)
        if self._unverified and len(weights_BGK) > 1 and not torch.compiler.is_compiling():
            self._verify(inputs, shared, weights_BGK)
        if torch.compiler.is_compiling():
            return self._run(self.model, inputs, shared, weights_BGK)
        try:
            if self.mode == "grouped" and not torch.is_grad_enabled():
                return self._run_grouped(inputs, shared, weights_BGK)
            return self._run(self.model, inputs, shared, weights_BGK)
        except NoBatchedForm as reason:
            self._give_up(str(reason))
            return self._run(self.model, inputs, shared, weights_BGK)

    @torch.no_grad()
    def static_state(self, weights_BGK: Float[Tensor, "B G K"] | Float[Tensor, "B K"]) -> dict[str, Tensor]:
        """One plain state dict, merged with the mean of these weights over a calibration set; new tensors."""
        weights_BGK = weights_BGK[:, None] if weights_BGK.ndim == 2 else weights_BGK
        if weights_BGK.shape[1] not in (1, self.n_groups) or weights_BGK.shape[2] != self.n_experts:
            raise ValueError(
                f"weights has shape {list(weights_BGK.shape)}, expected [samples, {self.n_groups}, {self.n_experts}]"
            )
        mean_GK = weights_BGK.mean(0)
        if not bool(torch.isfinite(mean_GK).all()):
            raise ValueError("weights hold NaN or infinities, or no sample at all; routing weights must be finite")
        tensors = self.reference.merged()
        merged = merged_parameters(tensors, mean_GK.expand(self.n_groups, -1))
        constants = {name: tensor.clone() for name, tensor in self.reference.constants().items()}
        return {name: tensor.to(tensors[name].base.dtype) for name, tensor in merged.items()} | constants

    @torch.no_grad()
    def weight_error_bound(self) -> dict[str, float]:
        """Mode "grouped": how far each parameter of a shared copy can lie from a sample's own, in Frobenius norm."""
        tensors = self.reference.merged()
        return {
            name: self.max_distance * float(t.vectors.flatten(1).float().norm(dim=1).max())
            for name, t in tensors.items()
        }

    @property
    def bytes_per_expert(self) -> int:
        """Memory of one expert's task vectors as they are held: whole, rounded, or as factors."""
        return sum(tensor.vectors_bytes for tensor in self.reference.merged().values()) // self.n_experts

    def _run_grouped(self, inputs: Sequence[Any], shared: dict[str, Any], weights_BGK: Tensor) -> Any:
        copies = shared_copies(weights_BGK, self.max_distance)
        if isinstance(self.model, VmapModule) or 4 * len(copies) > len(weights_BGK):
            return self._run(self.model, inputs, shared, weights_BGK)
        order = torch.tensor([b for copy in copies for b in copy], device=weights_BGK.device)
        first = torch.tensor([copy[0] for copy in copies for _ in copy], device=weights_BGK.device)
        starts = [0, *accumulate(len(copy) for copy in copies)]
        slices = tuple(slice(start, stop) for start, stop in pairwise(starts))
        ordered = [x[order] if isinstance(x, Tensor) else x for x in inputs]
        output = self._run(self.model, ordered, shared, weights_BGK[first], slices)
        return reordered(output, torch.argsort(order))

    def _run(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        shared: dict[str, Any],
        weights_BGK: Tensor,
        copies: tuple[slice, ...] = (),
    ) -> Any:
        self.routing.begin(weights_BGK, copies)
        try:
            for parameter in self.injected:
                parameter.set()
            return model(*inputs, **shared)
        finally:
            for parameter in self.injected:
                parameter.clear()
            self.routing.end()

    def _verify(self, inputs: Sequence[Any], shared: dict[str, Any], weights_BGK: Tensor) -> None:
        self._unverified = False
        pair = [x[:2] if isinstance(x, Tensor) else x for x in inputs]
        found = disagreement(
            lambda w: self._run(self.model, pair, shared, w), self.reference, pair, shared, weights_BGK
        )
        if found is not None:
            self._give_up(found)

    def _give_up(self, reason: str) -> None:
        self.model, self.injected = self.reference, []
        self._unverified = False
        self.fallback_reason = f"the whole model: {reason}"

    def _checked(self, inputs: Sequence[Any], weights: Tensor) -> Tensor:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if not tensors:
            raise ValueError("a merged model needs at least one positional tensor input, samples first")
        n_samples = len(tensors[0]) if tensors[0].ndim else 0
        if n_samples == 0:
            raise ValueError("empty batch: give at least one sample")
        for i, x in enumerate(inputs):
            if isinstance(x, Tensor) and (x.ndim == 0 or len(x) != n_samples):
                raise ValueError(
                    f"input {i} has shape {list(x.shape)}, expected {n_samples} samples first; "
                    "pass tensors that all samples share by keyword"
                )
        if not weights.is_floating_point():
            raise ValueError(f"weights must be floating point, got {weights.dtype}")
        each_group = (n_samples, self.n_groups, self.n_experts)
        if weights.shape == (n_samples, self.n_experts):
            weights_BGK = weights[:, None].expand(*each_group)
        elif weights.shape == (n_samples, 1, self.n_experts):  # a task-wise router's
            weights_BGK = weights.expand(*each_group)
        elif weights.shape == each_group:
            weights_BGK = weights
        else:
            raise ValueError(
                f"weights has shape {list(weights.shape)}, expected [{n_samples}, {self.n_experts}] or "
                f"{list(each_group)} (samples, layer groups, experts)"
            )
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(weights).all()):
            place = torch.nonzero(~torch.isfinite(weights))[0].tolist()
            raise ValueError(f"weights{place} is {weights[tuple(place)].item()}; routing weights must be finite")
        return weights_BGK


def _merged_tensor(
    name: str,
    base: Tensor,
    vectors: TaskVectors | CompressedVectors,
    group: int,
    routing: Routing,
    dtype: torch.dtype | None,
) -> MergedTensor:
    base = base.detach()
    own = base.dtype if dtype is None or base.ndim < 2 else dtype
    if isinstance(vectors, TaskVectors):
        return MergedTensor(name, base, vectors.vectors[name].to(base.device, own), group, routing)
    if name in vectors.dense:
        return MergedTensor(name, base, vectors.dense[name].to(base.device, own), group, routing)
    left_KOR, right_KRI = vectors.factors[name]
    return LowRankTensor(name, base, left_KOR.to(base), right_KRI.to(base), group, routing)
