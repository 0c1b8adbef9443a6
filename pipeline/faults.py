"""A validation fault as a line a user can act on: the key as it was written, the value, and the names that exist."""

import difflib
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

TAG = "kind"  # what tells the members of every union of ours apart
SHOWN_CHARS = 80


def explain(model: type[BaseModel], data: Mapping[str, Any], fault: Any) -> str:
    """One line for one of pydantic's faults in `data`, which was to be a `model`."""
    key, owner, annotation = _follow(model, data, fault["loc"])
    kind, value = fault["type"], fault["input"]
    if not key:  # of the whole configuration: the message names its keys itself
        return str(fault["msg"]).removeprefix("Value error, ")
    place, tags = ".".join(key), [_tag_of(member) for member in _members(annotation)]
    if kind == "extra_forbidden":
        return f"{place}: unknown key (value {_short(value)}); {_near(model, owner, key)}"
    if kind == "missing":
        return f"{place}: required and missing; add it"
    if kind == "union_tag_not_found":
        return f"{place}.{TAG}: required and missing; add one of {', '.join(tags)}"
    if kind == "union_tag_invalid":
        return f"{place}.{TAG}: {value[TAG]!r} is none of {', '.join(tags)}{_did_you_mean(str(value[TAG]), tags)}"
    message = (
        str(fault["msg"]).removeprefix("Value error, ").replace("valid tuple", "list").replace("dictionary", "mapping")
    )
    return f"{place}: {message}" + ("" if kind == "value_error" else f" (value {_short(value)})")


def _follow(model: type[BaseModel], data: Any, loc: tuple[Any, ...]) -> tuple[list[str], type[BaseModel] | None, Any]:
    """The key without pydantic's tags of union members, the model its last part belongs to, and its annotation."""
    key: list[str] = []
    annotation: Any = model
    owner: type[BaseModel] | None = None
    for part in loc:
        members = _members(annotation)
        if len(members) > 1 and isinstance(data, Mapping) and data.get(TAG) == part:
            annotation = next(member for member in members if _tag_of(member) == part)
            continue
        key.append(str(part))
        owner = annotation if _is_model(annotation) else None
        annotation = _below(annotation, part)
        data = _child(data, part)
    return key, owner, annotation


def _child(data: Any, part: Any) -> Any:
    if isinstance(data, Mapping):
        return data.get(part)
    return data[part] if isinstance(data, list) and isinstance(part, int) and part < len(data) else None


def _below(annotation: Any, part: Any) -> Any:
    """The annotation of what lies at `part` of a value of this annotation."""
    if _is_model(annotation):
        field = annotation.model_fields.get(str(part))
        return _bare(field.annotation) if field else None
    arguments = [argument for argument in get_args(annotation) if argument is not Ellipsis]
    return _bare(arguments[-1]) if arguments else None


def _bare(annotation: Any) -> Any:
    """`annotation` without `Annotated` and `| None`."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        left = [argument for argument in get_args(annotation) if argument is not NoneType]
        return _bare(left[0]) if len(left) == 1 else annotation
    return annotation


def _members(annotation: Any) -> list[type[BaseModel]]:
    """The models of a union; none for anything else."""
    if get_origin(annotation) not in (Union, UnionType):
        return []
    return [argument for argument in get_args(annotation) if _is_model(argument)]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _tag_of(member: type[BaseModel]) -> str:
    return str(get_args(member.model_fields[TAG].annotation)[0])


def _near(model: type[BaseModel], owner: type[BaseModel] | None, key: list[str]) -> str:
    """What an unknown key may have meant: a key beside it, one of the same name elsewhere, or the keys there are."""
    here = list(owner.model_fields) if owner else []
    close = difflib.get_close_matches(key[-1], here, n=1)
    if close:
        return f"did you mean {'.'.join([*key[:-1], close[0]])}?"
    everywhere = list(dict.fromkeys(_paths(model)))
    names = difflib.get_close_matches(key[-1], {path.rpartition(".")[2] for path in everywhere}, n=1, cutoff=0.8)
    elsewhere = [path for path in everywhere if path.rpartition(".")[2] in names]
    if elsewhere:
        return f"there is {' and '.join(elsewhere[:3])}"
    return f"known here: {', '.join(here)}" if here else "remove it"


def _paths(annotation: Any, prefix: str = "", seen: frozenset[Any] = frozenset()) -> Iterator[str]:
    """Dotted names of every field below a model; an item of a list or mapping is `*`."""
    if annotation in seen:
        return
    if _is_model(annotation):
        for name, field in annotation.model_fields.items():
            yield f"{prefix}{name}"
            yield from _paths(_bare(field.annotation), f"{prefix}{name}.", seen | {annotation})
    elif _members(annotation):
        for member in _members(annotation):
            yield from _paths(member, prefix, seen)
    elif get_origin(annotation) in (tuple, list, dict):
        yield from _paths(_below(annotation, 0), f"{prefix}*.", seen)


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; choose one"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 3]}..."
