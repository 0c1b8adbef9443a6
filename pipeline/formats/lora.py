"""LoRA adapters as PEFT saves them: low-rank steps on named weights of a base, expanded when a tensor is asked for.

Legend: R rank, I inputs, O outputs of an adapted layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ConfigError, DataError
from pipeline.formats.lazy import Checkpoint, open_file
from pipeline.formats.spans import Source, TensorFile

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<table>embedding_)?(?P<side>[AB])(\.(?!bias)[^.]+)??(\.weight)?$")
_SAVED = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.(weight|bias)$)")
# What changes the formula beyond theta_0 + scale B A.
_UNKNOWN = ("use_dora", "use_qalora", "lora_bias", "arrow_config", "trainable_token_indices", "megatron_config")


@dataclass(frozen=True)
class LowRank:
    """The step scale * B A on one weight; A is [R, I], B [O, R] (convolutions have further axes of kernel size)."""

    a: Source
    b: Source
    scale: float
    transposed: bool

    def delta(self, shape: torch.Size) -> Tensor:
        """The step in float32, in the shape of the weight it is added to."""
        a, b = self.a.read().float(), self.b.read().float()
        step = self.scale * (b.flatten(1) @ a.flatten(1))
        return (step.T if self.transposed else step).reshape(shape)

    def fits(self, shape: torch.Size) -> bool:
        """Whether the step has the shape of this weight."""
        a, b = self.a.header, self.b.header
        wanted = (a[0].numel(), b.shape[0]) if self.transposed else (b.shape[0], a[0].numel())
        found = tuple(shape) if self.transposed else (shape[0], math.prod(shape[1:]))
        return a.ndim >= 2 and b.ndim >= 2 and a.shape[0] == b[0].numel() and found == wanted


@dataclass(frozen=True)
class Adapted:
    """One weight of the base with an adapter's step added, in float32 (float64 stays)."""

    base: Source
    step: LowRank

    @property
    def header(self) -> Tensor:
        """Shape and dtype, as a meta tensor."""
        return Widened(self.base).header

    @property
    def scratch_bytes(self) -> int:
        """The sum and the step."""
        header = self.header
        return 2 * header.numel() * header.element_size()

    def read(self) -> Tensor:
        """theta_0 + scale B A."""
        origin = Widened(self.base).read()
        return origin + self.step.delta(origin.shape).to(origin.dtype)


@dataclass(frozen=True)
class Scaled:
    """A factor times a number: how an adapter's module of another scale joins those of the first's."""

    source: Source
    factor: float

    @property
    def header(self) -> Tensor:
        """Shape and dtype, as a meta tensor."""
        return self.source.header

    @property
    def scratch_bytes(self) -> int:
        """The product."""
        header = self.header
        return header.numel() * header.element_size()

    def read(self) -> Tensor:
        """The product, in the factor's dtype."""
        return self.source.read() * self.factor


@dataclass(frozen=True)
class Widened:
    """A tensor in float32 (float64 stays): a step on half-precision weights is finer than they are."""

    source: Source

    @property
    def header(self) -> Tensor:
        """Shape and dtype, as a meta tensor."""
        origin = self.source.header
        return torch.empty_like(origin, dtype=torch.promote_types(origin.dtype, torch.float32))

    @property
    def scratch_bytes(self) -> int:
        """Its own size where it is wider than what it is made of."""
        header, origin = self.header, self.source.header
        copied = header.numel() * header.element_size() if header.dtype != origin.dtype else 0
        return self.source.scratch_bytes + copied

    def read(self) -> Tensor:
        """The values."""
        return self.source.read().to(self.header.dtype)


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter: `steps` by the module they change, and `saved` tensors it brings whole."""

    path: Path
    file: TensorFile
    steps: Mapping[str, LowRank]
    saved: Mapping[str, Source]

    def steps_on(self, base: Checkpoint) -> dict[str, LowRank]:
        """The steps by the names of the base's files.

        Raises DataError where the adapter changes what the base has not, or has a step of another shape.
        """
        found: dict[str, LowRank] = {}
        lost, misshapen = [], []
        for module, step in self.steps.items():
            name = _name_in(base.sources, f"{module}.weight")
            if name is None:
                lost.append(module)
            elif not step.fits(base.sources[name].header.shape):
                misshapen.append(f"{name} {list(base.sources[name].header.shape)}")
            else:
                found[name] = step
        if lost or misshapen:
            what = f"changes {len(lost)} modules the base has not, first {lost[0]}" if lost else ""
            what += f"{' and ' if what else ''}does not fit {', '.join(misshapen[:3])}" if misshapen else ""
            raise DataError(
                f"{self.path}: {what} (base: names such as {next(iter(base.sources))}); give the base this adapter was "
                "trained on, in the layout it was trained in, such as its Hugging Face folder"
            )
        return found

    def saved_on(self, base: Checkpoint) -> dict[str, Source]:
        """The tensors it brings whole, by the names of the base's files where these have them."""
        return {_name_in(base.sources, name) or name: source for name, source in self.saved.items()}

    def sources_on(self, base: Checkpoint) -> dict[str, Source]:
        """The base's own sources with this adapter's changes, by the names of the base's files."""
        adapted = {name: Adapted(base.sources[name], step) for name, step in self.steps_on(base).items()}
        return {**base.sources, **adapted, **self.saved_on(base)}


def is_adapter(path: Path) -> bool:
    """Whether `path` is an adapter's folder, or its weights file."""
    return _config_of(path).is_file()


def open_adapter(path: Path) -> Adapter:
    """The adapter in a folder, or whose weights file is given, by its headers and its adapter_config.json."""
    place = _config_of(path)
    try:
        config = json.loads(place.read_text(encoding="utf-8"))
        kind = config.get("peft_type", "LORA")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{place}: not an adapter's configuration ({error}); fetch it again") from None
    asked = [key for key in _UNKNOWN if config.get(key)]
    if kind != "LORA" or asked:
        raise DataError(
            f"{place}: {', '.join(asked) or f'peft_type {kind}'} is not plain LoRA, whose step is alpha/r B A; "
            "merge it into its base first (model.merge_and_unload()) and give the checkpoint"
        )
    found = [place.parent / name for name in _FILES if (place.parent / name).is_file()]
    if path.is_file():
        found = [path]
    if not found:
        raise ConfigError(f"adapter folder {path} holds none of {', '.join(_FILES)}; name a folder with weights")
    return _adapter(path, open_file(found[0]), config)


def _config_of(path: Path) -> Path:
    return path / CONFIG if path.is_dir() else path.with_name(CONFIG)


def _adapter(path: Path, file: TensorFile, config: Mapping[str, Any]) -> Adapter:
    factors: dict[str, dict[str, Source]] = {}
    tables: set[str] = set()
    saved: dict[str, Source] = {}
    for name, source in file.sources.items():
        bare = name.removeprefix(_PREFIX)
        factor = _FACTOR.match(bare)
        if factor:
            factors.setdefault(factor["module"], {})[factor["side"]] = source
            if factor["table"]:
                tables.add(factor["module"])
        elif ".lora_" in bare:
            raise DataError(f"{file.file.path}: {name} is not plain LoRA, whose step is alpha/r B A; merge it first")
        else:
            saved[_SAVED.sub("", bare)] = source
    torn = [module for module, sides in factors.items() if sides.keys() != {"A", "B"}]
    if torn or not factors:
        what = f"{torn[0]} has only one of A and B" if torn else "it holds no lora_A and lora_B"
        raise DataError(f"{file.file.path}: not a LoRA adapter: {what}; save it again with PEFT's save_pretrained")
    steps = {}
    for module, sides in factors.items():
        scale = _scale(config, module, len(sides["A"].header), path)
        transposed = bool(config.get("fan_in_fan_out")) or module in tables
        steps[module] = LowRank(sides["A"], sides["B"], scale, transposed)
    return Adapter(path, file, steps, saved)


def _scale(config: Mapping[str, Any], module: str, rank: int, path: Path) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA; r is what the factors have, alpha may be the module's own."""
    alpha = config.get("lora_alpha")
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own
            break
    if not isinstance(alpha, int | float) or rank < 1:
        raise DataError(f"{path}: lora_alpha {alpha!r}, rank {rank} of {module}: not a LoRA adapter's configuration")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _name_in(known: Mapping[str, Source], name: str) -> str | None:
    """The base's name for an adapter's: the same, or the only one that ends so, or without its leading wrappers."""
    parts = name.split(".")
    for start in range(max(1, len(parts) - 2)):
        wanted = ".".join(parts[start:])
        if wanted in known:
            return wanted
        ending = [each for each in known if each.endswith(f".{wanted}")]
        if len(ending) == 1:
            return ending[0]
    return None
