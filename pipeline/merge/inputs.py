"""Base and experts, opened by their headers and checked against each other before any value is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from bd_core.methods import Method
from pipeline.errors import ConfigError, DataError, Faults
from pipeline.formats.clip_names import Part
from pipeline.formats.headers import check_experts
from pipeline.formats.lazy import Checkpoint, LazyState, open_checkpoint
from pipeline.formats.lora import Adapter, Widened, is_adapter, open_adapter
from pipeline.formats.spans import OpenFile, Source
from pipeline.merge.spec import MergeSpec


@dataclass(frozen=True)
class Expert:
    """One expert: its lazy state under the base's names, and the adapter it came as, if it did."""

    path: Path
    state: LazyState
    files: tuple[OpenFile, ...]
    adapter: Adapter | None
    naming: str


@dataclass(frozen=True)
class Inputs:
    """All that is merged. `base_state` is float32 where an adapter's step is finer than the base's dtype."""

    base: Checkpoint
    base_state: LazyState
    experts: tuple[Expert, ...]
    warnings: tuple[str, ...]

    @property
    def files(self) -> tuple[OpenFile, ...]:
        """Every weights file, each once."""
        every = [*self.base.opened, *(file for expert in self.experts for file in expert.files)]
        return tuple({file.path.resolve(): file for file in every}.values())

    def adapted(self) -> set[str] | None:
        """The names that adapters change, if every expert is an adapter; None otherwise."""
        if not all(expert.adapter for expert in self.experts):
            return None
        origin = self.base.state.sources
        return {
            name
            for expert in self.experts
            for name, source in expert.state.sources.items()
            if name in origin and _unwidened(source) != _unwidened(origin[name])
        }


def open_inputs(spec: MergeSpec, method: Method) -> Inputs:
    """The inputs by their headers; every file that cannot be used is told in one message."""
    faults = Faults()
    base: Checkpoint | None = None
    with faults.collect():
        if is_adapter(spec.base) and spec.base.is_dir():
            raise ConfigError(f"base {spec.base} is a LoRA adapter; give the model it was trained on")
        base = open_checkpoint(spec.base)
    opened: list[Checkpoint | Adapter] = []
    for path in spec.experts:
        with faults.collect():
            opened.append(open_adapter(path) if is_adapter(path) else open_checkpoint(path))
    faults.raise_any()
    assert base is not None
    if method.experts == "adapters":
        whole = [str(each.path) for each in opened if not isinstance(each, Adapter)]
        if whole:
            raise ConfigError(
                f"{method.name} merges LoRA adapters, {whole[0]} is a checkpoint; give folders with adapter_config.json"
            )
    experts = []
    for each in opened:
        with faults.collect():
            experts.append(_expert(each, base))
    faults.raise_any()
    base_state = base.state
    if any(isinstance(each, Adapter) for each in opened):
        base_state = _widened(base_state)
        experts = [
            Expert(expert.path, _widened(expert.state), expert.files, expert.adapter, expert.naming)
            for expert in experts
        ]
    return Inputs(base, base_state, tuple(experts), tuple(_warnings(spec)))


def check_layouts(inputs: Inputs, names: Sequence[str], spec: MergeSpec) -> None:
    """Raise DataError with all differences from the base in key sets, shapes and dtypes among what is merged.

    An expert may lack or have what is not merged: an image tower alone is enough where only `visual.*` is included.
    """
    origin = inputs.base_state.header
    headers: dict[str, Mapping[str, Tensor]] = {}
    for expert in inputs.experts:
        headers[str(expert.path)] = {
            name: value
            for name, value in expert.state.header.items()
            if name in names or (name not in origin and _is_chosen(name, spec))
        }
    check_experts({name: origin[name] for name in names}, headers)


def matching(pattern: str, inputs: Inputs) -> set[str]:
    """The base's names a glob stands for, by our names or the files' own; ConfigError when nobody has any."""
    found = {
        name
        for name, part in inputs.base.parts.items()
        if fnmatchcase(name, pattern) or any(fnmatchcase(source, pattern) for source in part.sources)
    }
    if not found and not any(fnmatchcase(name, pattern) for expert in inputs.experts for name in expert.state):
        some = ", ".join(list(inputs.base.parts)[:3])
        raise ConfigError(f"pattern {pattern!r} fits no tensor of {inputs.base.path}; its names are such as {some}")
    return found


def _is_chosen(name: str, spec: MergeSpec) -> bool:
    """Whether a name that only an expert has would be merged."""
    included = any(fnmatchcase(name, pattern) for pattern in spec.include)
    return included and not any(fnmatchcase(name, pattern) for pattern in spec.exclude)


def check_finite(name: str, value: Tensor, place: Path) -> None:
    """Raise DataError when a tensor that is copied holds NaN; infinities may be a mask's."""
    if value.is_floating_point() and bool(value.isnan().any()):
        raise DataError(f"{place}: {name} holds NaN; take an earlier checkpoint, or --allow-nonfinite to copy it")


def _expert(opened: Checkpoint | Adapter, base: Checkpoint) -> Expert:
    if isinstance(opened, Adapter):
        sources = opened.sources_on(base)
        new = {name: Part((name,)) for name in sources.keys() - base.sources.keys()}
        state = Checkpoint(opened.path, base.files, sources, {**base.parts, **new}, base.naming).state
        return Expert(opened.path, state, (opened.file.file,), opened, "LoRA")
    return Expert(opened.path, opened.state, opened.opened, None, opened.naming)


def _widened(state: LazyState) -> LazyState:
    """The same state with its half-precision tensors in float32."""
    return LazyState(
        {
            name: Widened(source) if source.header.is_floating_point() and source.header.element_size() < 4 else source
            for name, source in state.sources.items()
        }
    )


def _unwidened(source: Source) -> Source:
    return source.source if isinstance(source, Widened) else source


def _warnings(spec: MergeSpec) -> list[str]:
    """What is probably not meant, by the paths alone."""
    found = []
    places = [path.resolve() for path in spec.experts]
    for path in dict.fromkeys(places):
        if places.count(path) > 1:
            found.append(f"expert {path} is given {places.count(path)} times and counts as often")
        if path == spec.base.resolve():
            found.append(f"expert {path} is the base itself; its task vector is zero")
    return found
