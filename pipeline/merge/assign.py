"""What each tensor of the base will get: merged under which parameters, or copied and why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from bd_core.methods import METHODS, Method
from bd_core.methods.registry import DATA, check_parameters, find_method
from pipeline.errors import ConfigError, DataError
from pipeline.merge.adapters import adapter_settings
from pipeline.merge.inputs import Inputs, check_layouts, matching, open_inputs
from pipeline.merge.spec import MergeSpec

INTEGER = "integer or boolean"
FROM_ADAPTERS = ("scaling", "fan_in_fan_out")
_RESULTS = {"fit": "a fitted model", "per sample": "a model per sample"}


@dataclass(frozen=True)
class Group:
    """Tensors merged in one call: under `pattern`, with these parameters (defaults filled in)."""

    pattern: str
    names: tuple[str, ...]
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """A merge worked out from headers: groups to merge, and every other name of the base with why it is copied."""

    spec: MergeSpec
    method: Method
    inputs: Inputs
    groups: tuple[Group, ...]
    copied: Mapping[str, str]

    @cached_property
    def header(self) -> dict[str, Tensor]:
        """The output's names (ours), shapes and dtypes: the base's own."""
        return self.inputs.base.state.header


def make_plan(spec: MergeSpec) -> Plan:
    """The plan of a merge; everything that can be known to be wrong from options and headers is refused here."""
    method = known_method(spec.method)
    settings = {pattern: _parameters(method, spec, own) for pattern, own in {"*": {}, **spec.groups}.items()}
    inputs = open_inputs(spec, method)
    if method.experts == "adapters":
        told = adapter_settings(inputs)
        settings = {pattern: {**own, **told} for pattern, own in settings.items()}
    header = inputs.base_state.header
    copied = _copied(spec, inputs)
    chosen = [name for name in header if name not in copied or copied[name] == INTEGER]
    check_layouts(inputs, chosen, spec)
    copied |= _untouched(inputs, [name for name in header if name not in copied])
    # One order whatever the files are, so that random methods draw alike; it is that of safetensors on the disk.
    left = sorted(header.keys() - copied.keys(), key=lambda name: (-header[name].element_size(), name))
    groups = []
    for pattern in spec.groups:
        fitting = matching(pattern, inputs)
        groups.append(Group(pattern, tuple(name for name in left if name in fitting), settings[pattern]))
        left = [name for name in left if name not in fitting]
    groups.append(Group("*", tuple(left), settings["*"]))
    groups = [group for group in groups if group.names]
    if not groups:
        raise ConfigError(f"{spec.base}: nothing is left to merge; correct --include and --exclude")
    for group in groups:
        _try_parameters(method, len(inputs.experts), group)
    return Plan(spec, method, inputs, tuple(groups), copied)


def known_method(name: str) -> Method:
    """The method, if files are all it needs; ConfigError with the nearest names, or with what it needs instead."""
    try:
        method = find_method(METHODS, name)
    except ValueError as error:
        raise ConfigError(f"{error} `bd-merge methods` lists them all") from None
    if not method.from_files:
        gives = "" if method.result == "state" else f" and gives {_RESULTS[method.result]}"
        raise ConfigError(
            f"{method.name} needs {method.need}{gives}, which files alone cannot give; run it on data with "
            f"bd-merge run CONFIG baselines.methods.{method.name}={{}}"
        )
    return method


def _parameters(method: Method, spec: MergeSpec, own: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults, then the spec's parameters, then the group's own: known to the method and of the types it takes."""
    given = {**spec.parameters, **own}
    if data := sorted(DATA.intersection(given)):
        raise ConfigError(f"{method.name}: {data[0]} is data, which `bd-merge run` collects; leave it out")
    told = [name for name in FROM_ADAPTERS if name in given and method.experts == "adapters"]
    if told:
        raise ConfigError(f"{method.name}: {told[0]} is read off each adapter_config.json; leave it out")
    if "seed" in method.defaults:
        given.setdefault("seed", spec.seed)
    try:
        check_parameters(method, given | ({"scaling": 1.0} if method.experts == "adapters" else {}))
    except ValueError as error:
        raise ConfigError(f"{error}; `bd-merge methods {method.name}` describes its parameters") from None
    hints = get_type_hints(method.function)
    for name, value in given.items():
        try:
            given[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ConfigError(f"{method.name}: {name}={value!r} cannot be used ({reason}); correct it") from None
    return {**method.defaults, **given}


def _try_parameters(method: Method, experts: int, group: Group) -> None:
    """Have the method itself check its parameters, on a model of four numbers: it does so before it reads a tensor."""
    stand_in = {"weight": torch.zeros(2, 2)} if method.experts == "checkpoints" else {}
    try:
        method.function(stand_in, [stand_in] * experts, **group.parameters)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _copied(spec: MergeSpec, inputs: Inputs) -> dict[str, str]:
    """The names that no method is given, and why."""
    included = set().union(*(matching(pattern, inputs) for pattern in spec.include))
    reasons: dict[str, str] = {}
    for pattern in spec.exclude:
        reasons |= {name: f"excluded by {pattern}" for name in matching(pattern, inputs) if name not in reasons}
    for name, value in inputs.base_state.header.items():
        if name not in included:
            reasons[name] = f"not included by {' '.join(spec.include)}"
        elif name not in reasons and not value.is_floating_point():
            reasons[name] = INTEGER
        elif name not in reasons and not value.numel():
            reasons[name] = "empty"
    return reasons


def _untouched(inputs: Inputs, names: Sequence[str]) -> dict[str, str]:
    """What no adapter changes keeps the base's value."""
    adapted = inputs.adapted()
    if adapted is None:
        return {}
    if not adapted:
        raise DataError("the adapters change no tensor of the base; give other adapters")
    return {name: "no adapter changes it" for name in names if name not in adapted}


def collapsed(name: str) -> str:
    """A name with its numbers as `#`, so that the layers of a model are one line."""
    return re.sub(r"(?<![A-Za-z])\d+(?![A-Za-z])", "#", name)
