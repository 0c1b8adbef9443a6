"""What `bd-merge merge` is asked for: options, or a YAML file with the same content, or both (options win)."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from pipeline.config import Spec, UserPath, load_yaml, parse
from pipeline.errors import ConfigError

_UNITS = {"": 1, "B": 1, **{f"{unit}{b}": 1024**k for k, unit in enumerate("KMGT", 1) for b in ("", "B", "iB")}}


def size_bytes(value: object) -> int:
    """`2GiB`, `512M` or a number of bytes as bytes; ValueError for anything else. Units are powers of 1024."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGTkmgt]?i?[Bb]?)\s*", str(value))
    unit = found and (found[2][:1].upper() + found[2][1:].replace("b", "B"))
    if not found or unit not in _UNITS:
        raise ValueError(f"{value!r} is no size; write it as 2GiB, 512MiB or a number of bytes")
    return int(float(found[1]) * _UNITS[str(unit)])


def human(count: float) -> str:
    """Bytes to read: `605.2 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


SizeBytes = Annotated[int, BeforeValidator(size_bytes)]
# Ours: what a laptop has to spare. Every method on eight CLIP ViT-L/14 fits; most need a tenth of it.
DEFAULT_BUDGET = "2GiB"


class MergeSpec(Spec):
    """One merge of files."""

    method: str = Field(description="one of `bd-merge methods`")
    base: UserPath = Field(description="theta_0: a weights file, an index of shards, or a folder of one of them")
    experts: tuple[UserPath, ...] = Field(min_length=1, description="fine-tuned from base: as it, or LoRA adapters")
    output: UserPath | None = Field(default=None, description="a .safetensors or .pt file, or a folder as base's")
    parameters: dict[str, Any] = Field(default_factory=dict, description="the method's; `bd-merge methods NAME`")
    include: tuple[str, ...] = Field(default=("*",), description="globs of the names that are merged")
    exclude: tuple[str, ...] = Field(default=(), description="globs of the names that keep the base's value")
    groups: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="glob -> parameters of these names alone; the first that fits counts, each group merges apart",
    )
    seed: int = Field(default=0, ge=0, description="of methods that draw random numbers")
    memory_budget: SizeBytes = Field(default=size_bytes(DEFAULT_BUDGET), gt=0, description="for merging, beside inputs")
    integer_buffers: Literal["equal", "base"] = Field(
        default="equal", description="equal: refused when an expert's differ; base: the base's are taken"
    )
    allow_nonfinite: bool = Field(
        default=False, description="NaN or infinite entries of an expert count as not changed, the base's are kept"
    )


def load_spec(config: Path | None, overrides: Sequence[str], options: Mapping[str, Any]) -> MergeSpec:
    """The spec in `config` (none: empty) with `overrides` (key=value) and then the `options` that are set."""
    if config is None:
        place, data = "the options", {}
        if overrides:
            raise ConfigError(
                f"{overrides[0]!r} overrides no CONFIG; write the method's parameters as --set {overrides[0]}"
            )
    else:
        place, data = str(config), load_yaml(config, overrides)
    for key, value in options.items():
        if value is None or value in ([], (), {}):
            continue
        data[key] = {**(data.get(key) or {}), **value} if isinstance(value, Mapping) else value
    missing = [f"--{key.rstrip('s')}" for key in ("method", "base", "experts") if not data.get(key)]
    if missing and config is None:
        raise ConfigError(f"{', '.join(missing)} missing: bd-merge merge --method M --base B --expert E ... -o OUT")
    return parse(MergeSpec, data, place)


def parameter(text: str) -> tuple[str, Any]:
    """`keep=0.2` as ("keep", 0.2): numbers, true, false, null and [lists] by their value, all else as text."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name:
        raise ConfigError(f"{text!r} is not of the form name=value, such as keep=0.2")
    try:
        return name, json.loads(value)
    except ValueError:
        pass
    try:
        return name, float(value)  # 1e-5 and .5, which JSON has otherwise
    except ValueError:
        return name, value


def group(text: str) -> tuple[str, dict[str, Any]]:
    """`visual.*: scale=0.5 keep=0.1` as its pattern and parameters."""
    pattern, colon, rest = text.partition(":")
    settings = rest.replace(",", " ").split()
    if not colon or not pattern.strip() or not settings:
        raise ConfigError(f"group {text!r} is not of the form 'PATTERN: name=value ...', such as 'visual.*: scale=0.5'")
    return pattern.strip(), dict(parameter(each) for each in settings)
