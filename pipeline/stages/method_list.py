"""Which methods are compared with, by configuration: any list of them, the same one as often as its settings differ."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from bd_core.methods import METHODS, Method
from bd_core.methods.adamerging import check_settings as check_adamerging
from bd_core.methods.pareto_map import check_settings as check_map
from bd_core.methods.registry import DATA, Need, check_parameters, find_method
from bd_core.methods.surgery import check_settings as check_surgery
from pipeline.config import Spec

DEFAULT_METHODS: dict[str, dict[str, Any]] = {
    "weight_average": {},
    "task_arithmetic": {},
    "ties": {},
    "adamerging": {},
    "twin_merging": {},
}
# What a runner is told itself, with the default.
OPTIONS: dict[str, dict[str, Any]] = {
    "surgery": {"after": "task_arithmetic"},  # the row whose model is corrected
    "wemoe": {"steps": 1000, "learning_rate": 1e-4},  # of its gates; FusionBench's
    "map": {"trials": 1000},  # of NSGA-III, each one evaluation of the quadratics; ours
    # Merges measured on validation images, none of them: the inner level alone. Data-free: no image for the rest.
    "bmm": {"trials": 40, "data_free": False},
}
NAME = r"^(?!pretrained$|experts$|bd_)[a-z0-9][a-z0-9_]{0,40}$"
# Of methods that begin with a fit.
CHECKS: dict[str, Callable[..., None]] = {
    "adamerging": check_adamerging,
    "map": check_map,
    "surgery": check_surgery,
}


@dataclass(frozen=True)
class Entry:
    """One row of the comparison: a method with its parameters under a name of its own."""

    name: str
    method: Method
    parameters: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The method's; where the entry has another name than its method, with what was set."""
        if self.name == self.method.name:
            return self.method.title
        defaults = OPTIONS.get(self.method.name, {})
        told = {name: value for name, value in self.options.items() if value != defaults[name]}
        said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in {**self.parameters, **told}.items())
        return f"{self.method.title} ({said or self.name})"

    @property
    def need(self) -> Need:
        """What it is told beside checkpoints, as configured."""
        if self.method.name != "bmm":
            return self.method.need
        without_labels: Need = "nothing" if self.options["data_free"] else "unlabelled activations"
        return "labelled validation" if self.options["trials"] else without_labels

    @property
    def data(self) -> frozenset[str]:
        """What it is given beside checkpoints, by the names of the function's arguments."""
        given = DATA & {*self.method.required, *self.method.defaults}
        return given - {"grams"} if self.options.get("data_free") else given

    @property
    def uses_activations(self) -> bool:
        """Whether it wants the experts' Gram matrices."""
        return bool(self.data & {"grams", "squares"})

    @property
    def uses_labels(self) -> bool:
        """Whether it wants labelled validation images."""
        return self.need == "labelled validation"

    @property
    def uses_images(self) -> bool:
        """Whether it wants the auxiliary images or their tokens."""
        return self.need in ("unlabelled batches", "task labels", "labelled validation")

    @property
    def per_sample(self) -> bool:
        """Whether it gives a model a sample, and no single one."""
        return self.method.result == "per sample"


class BaselinesSpec(Spec):
    """The methods beside BD-Merging, by name with their parameters."""

    methods: dict[str, dict[str, Any]] = Field(
        default=DEFAULT_METHODS,
        description="{name: {parameter: value}}; `method` beside the parameters where the name is another",
    )
    batch_per_task: int = Field(default=16, ge=1, description="of methods fitted on batches; AdaMerging's code's")
    validation_per_task: int = Field(
        default=32, ge=1, description="labelled train images a task, for methods that need a validation split; ours"
    )

    @field_validator("methods")
    @classmethod
    def _usable(cls, methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        checked = {name: _checked(name, given) for name, given in methods.items()}
        entries = {name: entry_of(name, given) for name, given in checked.items()}
        for name, entry in entries.items():
            after = entry.options.get("after")
            usable = [other for other, e in entries.items() if not e.per_sample and "after" not in e.options]
            if after is not None and after not in usable:
                raise ValueError(
                    f"{name}: `after: {after}` is no row of baselines.methods that gives one model; take one of "
                    f"{', '.join(usable) or 'them, such as task_arithmetic, and add it'}"
                )
        return checked

    def entries(self) -> list[Entry]:
        """The methods as configured."""
        return [entry_of(name, given) for name, given in self.methods.items()]


def entry_of(name: str, given: Mapping[str, Any]) -> Entry:
    """The entry of one line of the configuration."""
    method = find_method(METHODS, str(given.get("method", name)))
    options = OPTIONS.get(method.name, {})
    parameters = {key: value for key, value in given.items() if key not in ("method", *options)}
    return Entry(name, method, parameters, {key: given.get(key, default) for key, default in options.items()})


def _checked(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The line with numbers as the method wants them; ValueError for one that could not be run."""
    entry = entry_of(name, given)
    if not re.match(NAME, name):
        raise ValueError(
            f"{name!r} cannot name a method's row: letters a-z, digits and _, not `pretrained`, `experts` or `bd_...`; "
            f"rename it, as in `my_{entry.method.name}: {{method: {entry.method.name}}}`"
        )
    if entry.method.experts != "checkpoints":
        raise ValueError(
            f"{name}: {entry.method.name} merges LoRA {entry.method.experts}, and a run's experts are whole "
            "checkpoints; merge adapters with `bd-merge merge`"
        )
    if taken := sorted(DATA & entry.parameters.keys()):
        raise ValueError(f"{name}: {', '.join(taken)} of {entry.method.name} comes from the run's data; leave it out")
    for key, default in OPTIONS.get(entry.method.name, {}).items():
        value = entry.options[key]
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise ValueError(f"{name}: {key}={value!r} must be of type {type(default).__name__}, such as {default!r}")
        if not isinstance(value, str | bool) and (value < 0 or (value == 0 and entry.method.name != "bmm")):
            raise ValueError(f"{name}: {key}={value!r} must be above 0")
    if entry.options.get("trials") and (searched := sorted({"log10_lambda", "scale"} & entry.parameters.keys())):
        raise ValueError(
            f"{name}: {', '.join(searched)} are searched in {entry.options['trials']} trials; set trials: 0"
        )
    check_parameters(entry.method, {**dict.fromkeys(entry.data), **entry.parameters})
    # `1` means `1.0` where a number with a fraction is asked for, and counts as the same.
    exact = {
        key: float(value) if isinstance(entry.method.defaults.get(key), float) and type(value) is int else value
        for key, value in entry.parameters.items()
    }
    _try(entry.method, exact)
    return {key: given[key] for key in ("method", *entry.options) if key in given} | exact


def _try(method: Method, parameters: Mapping[str, Any]) -> None:
    """Begin to merge two models of four numbers, so that a value out of range is told before the first image is read.

    Only begin: parameters are looked at first. Not even one step of a fit: torch takes seconds to load what an
    optimiser needs, and `plan` waits for this.
    """
    name = "mlp.weight"
    base, experts = {name: torch.eye(2)}, [{name: torch.ones(2, 2)}, {name: -torch.ones(2, 2)}]
    stand_ins = {"grams": {name: torch.eye(2).expand(2, 2, 2)}, "squares": {}, "validate": _no_accuracy}
    given = {name: value for name, value in stand_ins.items() if name in method.required}
    parameters = {name: value for name, value in parameters.items() if name != "gated"}  # patterns of real names
    try:
        if method.name in CHECKS:
            CHECKS[method.name](**parameters)
        else:
            method.function(base, experts, **given, **parameters)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{method.name} with {dict(parameters)}: {error}; correct it") from None


def _no_accuracy(state: Mapping[str, Tensor]) -> Tensor:
    return torch.zeros(2)
