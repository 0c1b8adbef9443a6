"""Specs (frozen, unknown keys refused) and reading them from YAML with dotted overrides.

Every component owns its spec and derives it from `Spec`; the whole configuration is put together in `workflow.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ConfigError
from pipeline.faults import explain


class Spec(BaseModel):
    """A frozen set of options that refuses unknown keys. What it holds is hashed: it changes bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Resources(Spec):
    """What changes the speed of a stage and never its bytes; not hashed."""

    cpus: float = Field(default=1.0, gt=0)
    gpus: float = Field(default=0.0, ge=0)
    threads: int = Field(default=1, ge=1)
    batch_size: int = Field(default=256, ge=1)


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:  # `~name` of a user that is not there
        raise ValueError(f"{path}: {error}; write the path out") from None


UserPath = Annotated[Path, AfterValidator(_expanded)]


SpecT = TypeVar("SpecT", bound=Spec)


def load_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration in `path` as plain data, `extends:` files below it and `key.sub=value` overrides above it."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        merged = OmegaConf.merge(*_with_bases(path, []))
        for override in overrides:
            _override(merged, override)
        data = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {_one_line(error)}; correct it there, or in the override") from None
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def parse(model: type[SpecT], data: dict[str, Any], place: str) -> SpecT:
    """`data` as a `model`; every fault in one `ConfigError` with full key, value and the names that exist."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [explain(model, data, fault) for fault in error.errors()]
        raise ConfigError(f"{place}: this configuration cannot be used\n  " + "\n  ".join(lines)) from None


def _with_bases(path: Path, seen: list[Path]) -> list[Any]:
    """Parsed configurations from the deepest base to `path` itself."""
    from omegaconf import DictConfig, OmegaConf

    if not path.is_file():
        state = "is not a file" if path.exists() else "does not exist"
        named = f", which {seen[-1]} extends," if seen else ""
        known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yaml"))) or "none in ./configs"
        raise ConfigError(f"configuration {path}{named} {state}; known ones: {known}")
    if path.resolve() in seen:
        circle = " -> ".join(str(each) for each in [*seen, path.resolve()])
        raise ConfigError(f"{path}: `extends` forms a circle, {circle}; remove one of them")
    loaded = OmegaConf.load(path)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: the top level is a list; write a mapping of keys, such as `name: mine`")
    base = loaded.pop("extends", None)
    if base is None:
        return [loaded]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: {base!r} is not the path of one file; name one, relative to this file")
    return [*_with_bases(path.parent / base, [*seen, path.resolve()]), loaded]


def _override(merged: Any, override: str) -> None:
    """Set one `key.sub=value` in `merged`; items of lists go by number, as in `tasks.0.name=mine`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form key=value, such as fit_router.steps=100")
    try:
        # Unresolved, so that an interpolation may name any other key of the configuration.
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore[index, call-overload]
        OmegaConf.update(merged, key, value, merge=True)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"override {override!r} cannot be applied ({_one_line(error)}); correct it") from None


def _one_line(error: Exception) -> str:
    """The error without line breaks; OmegaConf's without its class names, led by the key it is about."""
    key = getattr(error, "full_key", None)
    if key:
        return f"{key}: {str(error).splitlines()[0].removeprefix('KeyError raised while resolving interpolation: ')}"
    return " ".join(str(error).split())
