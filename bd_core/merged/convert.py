"""From a module to its per-sample form: which module becomes what, and why one cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bd_core.merged.attention import MergedMultiheadAttention
from bd_core.merged.conv import MergedConv2d
from bd_core.merged.fallback import VmapModule
from bd_core.merged.layers import MergedBatchNorm, MergedEmbedding, MergedGroupNorm, MergedLayerNorm, MergedLinear
from bd_core.merged.open_clip import (
    MergedAttentionPool,
    MergedVisionTransformer,
    is_attention_pool,
    is_vision_transformer,
)
from bd_core.merged.routing import NoBatchedForm
from bd_core.merged.tensors import MergedTensor

__all__ = ["Converter", "skeleton"]


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model's structure in evaluation mode, without its parameters: placeholders stand for them.

    The model's own tensors are neither copied nor referenced, except buffers outside its state dict (copied).
    """
    kept = set(model.state_dict(keep_vars=True))
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty(0), requires_grad=False)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in kept:
            memo[id(buffer)] = torch.empty(0, dtype=buffer.dtype)
    return copy.deepcopy(model, memo).eval()


class Converter:
    """Turns the skeleton of a model into its per-sample form, module by module.

    `tensors` holds a `MergedTensor` for every merged name of the state dict, `constants` the rest of it. After
    `convert`, `reasons` says for each module that runs through torch.func why it has no batched form, and `injected`
    lists the plain parameters that are set anew in every forward pass.
    """

    def __init__(self, tensors: dict[str, MergedTensor], constants: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.constants = constants
        self.reasons: list[str] = []
        self.injected: list[Injected] = []
        self._done: dict[int, nn.Module] = {}

    def convert(self, module: nn.Module, path: str = "") -> nn.Module:
        """The per-sample form of the module at this path; the module itself where nothing in it is merged."""
        if id(module) in self._done:
            return self._done[id(module)]
        if self._is_fixed(module, path):
            for name, part in module.named_modules():
                self._restore_constants(part, _join(path, name) if name else path)
            self._done[id(module)] = module
            return module
        try:
            converted = self._native(module, path)
        except NoBatchedForm as reason:
            self.reasons.append(f"{path or 'the model'} ({type(module).__name__}): {reason}")
            converted = self._through_vmap(module, path)
        self._done[id(module)] = converted
        return converted

    def _native(self, module: nn.Module, path: str) -> nn.Module:
        for layer_type, build in NATIVE.items():
            if isinstance(module, layer_type):
                if not _keeps_forward(module, layer_type):
                    raise NoBatchedForm(f"its forward is not {layer_type.__name__}'s")
                if not all(_join(path, name) in self.tensors for name, _ in module.named_parameters()):
                    raise NoBatchedForm("only some of its parameters have task vectors")
                return build(self, module, path)
        parameters = [name for name, _ in module.named_parameters(recurse=False)]
        buffers = [name for name, _ in module.named_buffers(recurse=False)]
        own = [name for name in (*parameters, *buffers) if _join(path, name) in self.tensors]
        if own and (is_vision_transformer(module) or is_attention_pool(module)):
            if not set(parameters) <= set(own):
                raise NoBatchedForm("only some of its parameters have task vectors")
            self._convert_children(module, path)
            for name in own:
                del module._parameters[name]
            tensors = {name: self.tensors[_join(path, name)] for name in own}
            if "class_embedding" in tensors:
                return MergedVisionTransformer(module, tensors)
            return MergedAttentionPool(module, tensors["positional_embedding"])
        has_children = next(module.children(), None) is not None
        if own and not has_children and type(module).__name__ not in MULTIPLIES_BY_ITS_OWN:
            raise NoBatchedForm(f"no batched form is known for a module that uses {', '.join(own)} itself")
        if PROJECTIONS in own:  # no broadcasting: better this module alone than the whole model
            raise NoBatchedForm(f"no batched form is known for a module that multiplies by {PROJECTIONS} itself")
        for name in own:
            self.injected.append(Injected(module, name, self.tensors[_join(path, name)]))
        self._convert_children(module, path)
        self._restore_constants(module, path)
        return module

    def _is_fixed(self, module: nn.Module, path: str) -> bool:
        """Whether the module has parameters and none of them task vectors; batch statistics are no such thing."""
        prefix = f"{path}." if path else ""
        parts = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        if any(name.startswith(prefix) for name in self.tensors) or any(part.running_mean is None for part in parts):
            return False
        return any(_join(path, name) in self.constants for name, _ in module.named_parameters())

    def _convert_children(self, module: nn.Module, path: str) -> None:
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = self.convert(child, _join(path, name))

    def _restore_constants(self, module: nn.Module, path: str) -> None:
        for name in list(module._buffers):
            if _join(path, name) in self.constants:
                module._buffers[name] = self.constants[_join(path, name)]
        for name in list(module._parameters):
            if _join(path, name) in self.constants:
                # The merged model has no parameters and an empty state dict, whatever it holds.
                del module._parameters[name]
                module.register_buffer(name, self.constants[_join(path, name)], persistent=False)

    def _through_vmap(self, module: nn.Module, path: str) -> VmapModule:
        prefix = f"{path}." if path else ""
        inside = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
        fixed = {name.removeprefix(prefix): t for name, t in self.constants.items() if name.startswith(prefix)}
        if not inside:
            raise ValueError(f"{path} ({type(module).__name__}) has no task vectors and ties samples to their batch")
        return VmapModule(module, inside, fixed)

    def own(self, path: str, name: str) -> MergedTensor | None:
        """The merged tensor of a module's own parameter, if it has it."""
        return self.tensors.get(_join(path, name))

    def needed(self, path: str, name: str) -> MergedTensor:
        """The same for one it must have."""
        return self.tensors[_join(path, name)]


class Injected:
    """A plain parameter of a module with children, or a layer scale's, set to every sample's value for a forward pass.

    Models use such parameters by broadcasting against activations [B, ...], so the sample goes first: [1, T, D] and
    [T, D] become [B, T, D], [D] becomes [B, 1, D]. Whether the model does so is checked on the first batch.
    """

    def __init__(self, module: nn.Module, name: str, tensor: MergedTensor) -> None:
        self.module, self.name, self.tensor = module, name, tensor
        del (module._parameters if name in module._parameters else module._buffers)[name]
        module.add_module(f"merged_{name}", tensor)

    def set(self) -> None:
        """Put the merged value of this pass where the model looks for its parameter."""
        value = self.tensor()
        own = self.tensor.base
        if own.ndim >= 2 and own.shape[0] == 1:
            value = value[:, 0]
        elif own.ndim <= 1:
            value = value[:, None]
        self.module.__dict__[self.name] = value

    def clear(self) -> None:
        """Take it away again, with the graph that hangs on it."""
        self.module.__dict__.pop(self.name, None)


Build = Callable[[Converter, nn.Module, str], nn.Module]


def _linear(converter: Converter, layer: nn.Module, path: str) -> nn.Module:
    assert isinstance(layer, nn.Linear)
    return MergedLinear(layer, converter.needed(path, "weight"), converter.own(path, "bias"))


def _conv2d(converter: Converter, layer: nn.Module, path: str) -> nn.Module:
    assert isinstance(layer, nn.Conv2d)
    return MergedConv2d(layer, converter.needed(path, "weight"), converter.own(path, "bias"))


def _embedding(converter: Converter, layer: nn.Module, path: str) -> nn.Module:
    assert isinstance(layer, nn.Embedding)
    if layer.max_norm is not None:
        raise NoBatchedForm("Embedding with max_norm changes its table in the forward pass")
    return MergedEmbedding(layer, converter.needed(path, "weight"))


def _layer_norm(converter: Converter, layer: nn.Module, path: str) -> nn.Module:
    assert isinstance(layer, nn.LayerNorm)
    fp32 = type(layer).__name__ == "LayerNormFp32"
    return MergedLayerNorm(layer, converter.own(path, "weight"), converter.own(path, "bias"), fp32)


def _group_norm(converter: Converter, layer: nn.Module, path: str) -> nn.Module:
    assert isinstance(layer, nn.GroupNorm)
    return MergedGroupNorm(layer, converter.own(path, "weight"), converter.own(path, "bias"))


def _batch_norm(converter: Converter, layer: nn.Module, path: str) -> nn.Module:
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    mean, variance = converter.own(path, "running_mean"), converter.own(path, "running_var")
    if mean is None or variance is None:
        raise NoBatchedForm("batch normalisation without running statistics")
    return MergedBatchNorm(layer, converter.own(path, "weight"), converter.own(path, "bias"), mean, variance)


def _attention(converter: Converter, layer: nn.Module, path: str) -> nn.Module:
    assert isinstance(layer, nn.MultiheadAttention)
    prefix = f"{path}." if path else ""
    own = {name.removeprefix(prefix): t for name, t in converter.tensors.items() if name.startswith(prefix)}
    return MergedMultiheadAttention(layer, own)


NATIVE: dict[type[nn.Module], Build] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.modules.batchnorm._BatchNorm: _batch_norm,
    nn.MultiheadAttention: _attention,
}
# Without children, their only parameter broadcast against activations: open_clip's and timm's.
MULTIPLIES_BY_ITS_OWN = frozenset({"LayerScale"})
PROJECTIONS = "in_proj_weight"  # of attention that is not torch's: open_clip's custom blocks
# Subclasses that compute what their parent does, up to dtypes: open_clip's and timm's.
SAME_AS_PARENT = frozenset({"LayerNorm", "LayerNormFp32", "NonDynamicallyQuantizableLinear"})


def _keeps_forward(module: nn.Module, layer_type: type[nn.Module]) -> bool:
    own = type(module).forward is layer_type.forward
    return (own and "forward" not in module.__dict__) or type(module).__name__ in SAME_AS_PARENT


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
