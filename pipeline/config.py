"""Specs (frozen, unknown keys refused) and reading them from YAML with dotted overrides.

Every component owns its spec and derives it from `Spec`; the whole configuration is put together in `workflow.py`.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import ConfigError


class Spec(BaseModel):
    """A frozen set of options that refuses unknown keys. What it holds is hashed: it changes bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Resources(Spec):
    """What changes the speed of a stage and never its bytes; not hashed."""

    cpus: float = 1.0
    gpus: float = 0.0
    threads: int = 1
    batch_size: int = 256


SpecT = TypeVar("SpecT", bound=Spec)


def load_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration in `path` as plain data, `extends:` files below it and `key.sub=value` overrides above it."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        merged = OmegaConf.merge(*_with_bases(path, []), OmegaConf.from_dotlist(_checked(overrides)))
        data = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}; correct the file or the override") from error
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def parse(model: type[SpecT], data: dict[str, Any], place: str) -> SpecT:
    """`data` as a `model`; every fault in one `ConfigError` with full key, value and the names that exist."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(model, fault) for fault in error.errors()]
        raise ConfigError(f"{place}: {len(lines)} fault(s) in the configuration\n  " + "\n  ".join(lines)) from None


def _with_bases(path: Path, seen: list[Path]) -> list[Any]:
    """Parsed configurations from the deepest base to `path` itself."""
    from omegaconf import DictConfig, OmegaConf

    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yaml"))) or "none in ./configs"
        raise ConfigError(f"configuration {path} does not exist; known ones: {known}")
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `extends` forms a circle; remove one of them")
    loaded = OmegaConf.load(path)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: the top level must be a mapping of keys, not a {type(loaded).__name__}")
    base = loaded.pop("extends", None)
    below = _with_bases(path.parent / str(base), [*seen, path.resolve()]) if base else []
    return [*below, loaded]


def _checked(overrides: Sequence[str]) -> list[str]:
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"override {override!r} is not of the form key=value, such as router.steps=100")
    return list(overrides)


def _explain(model: type[BaseModel], fault: Any) -> str:
    # Tags of discriminated unions stand in the location too; they are not keys a user wrote, yet they help.
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(fault["loc"][-1]), sorted(_all_keys(model)), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; remove it"
        return f"{key}: unknown key (value {fault['input']!r}){hint}"
    if fault["type"] == "missing":
        return f"{key}: required and missing; add it"
    return f"{key}: {fault['msg']} (value {fault['input']!r})"


def _all_keys(model: type[BaseModel], seen: frozenset[type] = frozenset()) -> set[str]:
    names = set(model.model_fields)
    for field in model.model_fields.values():
        for child in _models_in(field.annotation):
            if child not in seen:
                names |= _all_keys(child, seen | {model})
    return names


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for argument in getattr(annotation, "__args__", ()):
        found += _models_in(argument)
    return found
