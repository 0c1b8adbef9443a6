"""What `merge`, `explain` and `methods` print."""

import inspect
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bd_core.methods import METHODS, Method
from bd_core.methods.registry import DATA, find_method
from pipeline.errors import ConfigError
from pipeline.merge.assign import FROM_ADAPTERS, Plan, collapsed
from pipeline.merge.memory import working_set
from pipeline.merge.run import Done
from pipeline.merge.spec import human

CONSOLE = Console(soft_wrap=True)


def show_methods() -> None:
    """A row a method: what it needs, what it costs, where it is from and its defaults."""
    table = Table(title="merging methods", title_justify="left")
    for column in ("method", "needs", "cost", "defaults", "source"):
        table.add_column(column, no_wrap=column == "method", overflow="fold")
    for method in METHODS.values():
        needs = f"{method.need}; LoRA experts" if method.experts == "adapters" else _needs(method)
        defaults = words(settings(method)) or "–"
        table.add_row(*map(escape, (method.name, needs, method.cost, defaults, method.source)))
    CONSOLE.print(table)
    CONSOLE.print(
        "bd-merge merge runs those that can do with files alone; bd-merge run CONFIG runs all, on data.\n"
        "bd-merge methods NAME tells a method's formula, its defaults and where they come from.",
        highlight=False,
    )


_HOLDS = {
    "chunk": "a chunk of K experts",
    "tensor": "K experts of a tensor",
    "matrices": "K experts of a few matrices",
    "model": "K models",
}


def _needs(method: Method) -> str:
    return f"{method.need}, or nothing" if method.from_files and method.need != "nothing" else method.need


def show_method(name: str) -> None:
    """One method's own words."""
    try:
        method = find_method(METHODS, name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    CONSOLE.print(f"{method.name}: {method.title} ({method.source})", markup=False, highlight=False)
    text = f"needs {_needs(method)}; {method.cost}; holds {_HOLDS[method.memory]} beside in- and output"
    CONSOLE.print(f"{text}\n\n{inspect.getdoc(method.function)}\n\n", markup=False, highlight=False)
    for key, value in settings(method).items():
        CONSOLE.print(f"  --set {key}={value}", markup=False, highlight=False)


def settings(method: Method) -> dict[str, Any]:
    """The defaults of what a user may set; the seed has an option of its own, the rest comes with data or adapters."""
    told = {"seed", *DATA, *(FROM_ADAPTERS if method.experts == "adapters" else ())}
    return {name: value for name, value in method.defaults.items() if name not in told}


def words(parameters: Mapping[str, Any]) -> str:
    """Parameters on a line: what changes no result is left out, long lists are counted."""
    shown = {name: value for name, value in parameters.items() if name != "budget_bytes"}
    return " ".join(f"{name}={_short(value)}" for name, value in shown.items())


def _short(value: Any) -> str:
    long = isinstance(value, tuple | list) and len(value) > 2
    return f"[{len(value)} patterns]" if long and isinstance(value[0], str) else str(value)


def show_plan(plan: Plan) -> None:
    """What each tensor will get, the layers of a model on one line, and the memory it takes."""
    table = Table(title=f"{plan.method.title} of {len(plan.inputs.experts)} experts", title_justify="left")
    for column in ("tensors", "count", "shape", "dtype", "gets"):
        table.add_column(column, overflow="fold", justify="right" if column == "count" else "left")
    rows: dict[tuple[str, str, str, str], int] = {}
    gets = dict(_gets(plan))
    for name, value in plan.header.items():
        key = (collapsed(name), str(list(value.shape)), str(value.dtype).removeprefix("torch."), gets[name])
        rows[key] = rows.get(key, 0) + 1
    for (name, shape, dtype, what), count in rows.items():
        table.add_row(escape(name), str(count), escape(shape), dtype, escape(what))
    CONSOLE.print(table)
    merged = sum(len(group.names) for group in plan.groups)
    needed = working_set(plan)
    for warning in plan.inputs.warnings:
        CONSOLE.print(f"warning: {warning}", markup=False, highlight=False)
    names = {plan.inputs.base.naming, *(expert.naming for expert in plan.inputs.experts)}
    CONSOLE.print(f"{merged} merged, {len(plan.copied)} copied; names of {', '.join(sorted(names))}", highlight=False)
    CONSOLE.print(
        f"reads {human(sum(file.size_bytes for file in plan.inputs.files))}, takes up to {human(needed.bytes)} of "
        f"memory (at {needed.tensor}) of --memory-budget {human(plan.spec.memory_budget)}",
        markup=False,
        highlight=False,
    )
    if len(plan.groups) > 1:
        CONSOLE.print("Groups are merged apart: what a method reckons over the whole model is of the group.")


def _gets(plan: Plan) -> list[tuple[str, str]]:
    found = [(name, f"the base's: {reason}") for name, reason in plan.copied.items()]
    for group in plan.groups:
        gets = f"{plan.method.name} {words(group.parameters)}".strip()
        found += [(name, gets) for name in group.names]
    return found


def show_done(done: Done) -> None:
    """Where the merged model and its manifest are, and what it took."""
    manifest: Mapping[str, Any] = done.manifest
    files = manifest["output"]["files"]
    total = sum(int(file["bytes"]) for file in files)
    read = sum(file["bytes"] for each in (manifest["base"], *manifest["experts"]) for file in each["files"])
    took = f"{manifest['seconds']:.1f} s for {human(read)}"
    lines = [
        f"merged   {done.output} ({human(total)}, {manifest['method']['title']} of {len(manifest['experts'])} experts)",
        *(f"sha256   {file['sha256']}  {file['path']}" for file in files),
        f"manifest {done.manifest_path}",
        f"took     {took}, peak memory {human(manifest['memory']['peak_bytes'])}",
    ]
    for line in lines:
        CONSOLE.print(line, markup=False, highlight=False)
