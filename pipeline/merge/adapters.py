"""Methods that merge LoRA adapters themselves, not the checkpoints they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from bd_core.methods import merge_stream
from pipeline.errors import ConfigError
from pipeline.formats.lazy import LazyState
from pipeline.formats.lora import Adapter, LowRank, Scaled
from pipeline.formats.spans import Source
from pipeline.merge.inputs import Inputs


def adapter_settings(inputs: Inputs) -> dict[str, Any]:
    """What an adapters' method must know and configurations tell: each adapter's scaling, and how weights lie."""
    adapters = _adapters(inputs)
    lies = {step.transposed for adapter in adapters for step in adapter.steps.values()}
    if len(lies) > 1:
        raise ConfigError("the adapters differ in fan_in_fan_out, or adapt embeddings; merge those as checkpoints")
    return {"scaling": [_scale_of(adapter) for adapter in adapters], "fan_in_fan_out": lies == {True}}


def adapter_stream(
    method: str, inputs: Inputs, names: Sequence[str], parameters: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors of these names of ours, each by the names of the base's files."""
    base = inputs.base
    wanted = {source for name in names for source in base.parts[name].sources}
    experts = [_state(adapter, inputs, wanted) for adapter in _adapters(inputs)]
    changed = {name for adapter in _adapters(inputs) for name in _changed(adapter, inputs) if name in wanted}
    for name in base.sources:
        if name in wanted - changed:  # such as the keys of an attention of which queries and values are adapted
            yield name, base.sources[name].read()
    own = LazyState({name: source for name, source in base.sources.items() if name in changed})
    yield from merge_stream(method, own, experts, **parameters)


def _adapters(inputs: Inputs) -> list[Adapter]:
    return [expert.adapter for expert in inputs.experts if expert.adapter is not None]


def _scale_of(adapter: Adapter) -> float:
    return next(iter(adapter.steps.values())).scale


def _changed(adapter: Adapter, inputs: Inputs) -> Mapping[str, object]:
    return {**adapter.steps_on(inputs.base), **adapter.saved_on(inputs.base)}


def _state(adapter: Adapter, inputs: Inputs, wanted: set[str]) -> LazyState:
    """An adapter's tensors under PEFT's names for the base's own modules; modules of another scale have it in B."""
    sources: dict[str, Source] = {}
    for name, step in adapter.steps_on(inputs.base).items():
        if name in wanted:
            module = name.removesuffix(".weight")
            sources |= {f"{module}.lora_A.weight": step.a, f"{module}.lora_B.weight": _b(step, _scale_of(adapter))}
    sources |= {name: source for name, source in adapter.saved_on(inputs.base).items() if name in wanted}
    return LazyState(sources)


def _b(step: LowRank, scale: float) -> Source:
    return step.b if step.scale == scale else Scaled(step.b, step.scale / scale)
