"""The merged model: one forward pass, every sample through its own merge.

Legend: B batch, G layer groups, K experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bd_core.compression import CompressedVectors
from bd_core.merged.convert import Converter, skeleton
from bd_core.merged.fallback import VmapModule
from bd_core.merged.routing import MergedTensor, NoBatchedForm, Routing
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
    """

    def __init__(
        self,
        model: nn.Module,
        base: Mapping[str, Tensor],
        experts: Sequence[Mapping[str, Tensor]] | TaskVectors | CompressedVectors,
        groups: LayerGroups | Mapping[str, int] | None = None,
        *,
        verify: bool = True,
    ) -> None:
        """`groups` maps every merged name to its layer group (default: one group).

        Raises ValueError naming the parameter if model, base and experts do not fit.
        """
        super().__init__()
        vectors = experts if isinstance(experts, TaskVectors) else None
        if isinstance(experts, CompressedVectors):
            vectors = experts.expanded()
        elif not isinstance(experts, TaskVectors):
            vectors = task_vectors(base, experts)
        assert vectors is not None
        _check_fit(model, base, vectors)
        index = groups.index if isinstance(groups, LayerGroups) else dict(groups or dict.fromkeys(vectors.names, 0))
        self.n_experts = vectors.n_experts
        self.n_groups = _n_groups(index, vectors, groups)
        self.routing = Routing()
        tensors = {
            name: MergedTensor(name, base[name].detach(), stacked.to(base[name]), index[name], self.routing)
            for name, stacked in vectors.vectors.items()
        }
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
        if self._unverified and len(weights_BGK) > 1:
            self._verify(inputs, shared, weights_BGK)
        try:
            return self._run(self.model, inputs, shared, weights_BGK)
        except NoBatchedForm as reason:
            self._give_up(str(reason))
            return self._run(self.model, inputs, shared, weights_BGK)

    def _run(self, model: nn.Module, inputs: Sequence[Any], shared: dict[str, Any], weights_BGK: Tensor) -> Any:
        self.routing.begin(weights_BGK)
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


def _check_fit(model: nn.Module, base: Mapping[str, Tensor], vectors: TaskVectors) -> None:
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in base:
            raise ValueError(f"the base lacks {name}, which the model needs")
        if base[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {list(base[name].shape)} in the base, {list(tensor.shape)} in the model"
            )
        if base[name].is_floating_point() and name not in vectors.vectors and name not in vectors.constants:
            raise ValueError(f"the experts lack {name}, which the base has")
    for name in base:
        if name not in own:
            raise ValueError(f"the base has {name}, which the model does not know")
    for name, stacked in vectors.vectors.items():
        if name not in base:
            raise ValueError(f"the experts have {name}, which the base lacks")
        if stacked.shape[1:] != base[name].shape:
            raise ValueError(
                f"task vectors of {name} have shape {list(stacked.shape[1:])}, the base {list(base[name].shape)}"
            )
        if not bool(torch.isfinite(stacked).all()):
            raise ValueError(f"task vectors of {name} hold NaN or infinities")


def _n_groups(index: Mapping[str, int], vectors: TaskVectors, groups: object) -> int:
    for name in vectors.names:
        if name not in index:
            raise ValueError(f"groups has no layer group for {name}")
        if index[name] < 0:
            raise ValueError(f"layer group of {name} is {index[name]}; groups count from 0")
    if isinstance(groups, LayerGroups):
        return groups.n_groups
    return 1 + max(index[name] for name in vectors.names)
