"""The commands that merge files. Heavy imports stand inside, so that `--help` answers at once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import BDMergeError

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides of CONFIG, e.g. parameters.keep=0.1.")
]


class Interrupted(BDMergeError):
    """Ctrl-C, or the job system's SIGTERM."""

    exit_code = 130


class IntegerBuffers(StrEnum):
    """Where a merge takes integer tensors from."""

    equal = "equal"
    base = "base"


def merge(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="A YAML file of what the options below say.")
    ] = None,
    overrides: Overrides = None,
    method: Annotated[str | None, typer.Option("--method", help="One of those of bd-merge methods.")] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="What the experts were fine-tuned from: a file, an index, a folder.")
    ] = None,
    experts: Annotated[
        list[Path] | None, typer.Option("--expert", help="One for each expert: as base, or a LoRA adapter's folder.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .safetensors or .pt file, or a folder like base's.")
    ] = None,
    parameters: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the method, e.g. keep=0.2.")
    ] = None,
    groups: Annotated[
        list[str] | None,
        typer.Option("--group", metavar="'PATTERN: NAME=VALUE'", help="Parameters of these tensors, merged apart."),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="PATTERN", help="Merge these names (globs); default: all.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="These names keep the base's value.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of methods that draw; default: 0.")] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            "--memory-budget",
            metavar="SIZE",
            help="For merging, beside the inputs' file cache; a merge that needs more is refused before it reads. "
            "Default: 2GiB (ours: every method fits eight CLIP ViT-L/14 in it, and a laptop has it to spare).",
        ),
    ] = None,
    integer_buffers: Annotated[
        IntegerBuffers | None,
        typer.Option("--integer-buffers", help="Experts' integer tensors must be equal, or the base's are taken."),
    ] = None,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="NaN and infinities of an expert count as not changed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check, and say what each tensor will get.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that exists.")] = False,
) -> None:
    """Merge checkpoint files: no data, no Ray, tensor by tensor; the output is verified and described by a manifest.

    Reads safetensors (also sharded), torch state dicts, Hugging Face folders and LoRA adapters; runs no pickle. The
    output has the base's names and dtypes, whatever the experts' are called.

    \b
    Example:
      bd-merge merge --method ties --base b.safetensors --expert a.safetensors --expert c.safetensors -o out.safetensors
      bd-merge merge --method task_arithmetic --base b.pt --expert a.pt --expert c.pt -o out.pt --set scale=0.4
      bd-merge merge merge.yaml method=tsv_m --force
    """
    from pipeline.merge.assign import make_plan
    from pipeline.merge.run import merge_files
    from pipeline.merge.show import show_done, show_plan
    from pipeline.merge.spec import group, load_spec, parameter

    spec = load_spec(
        config,
        overrides or (),
        {
            "method": method,
            "base": base,
            "experts": experts,
            "output": output,
            "parameters": dict(map(parameter, parameters or ())),
            "groups": dict(map(group, groups or ())),
            "include": include,
            "exclude": exclude,
            "seed": seed,
            "memory_budget": memory_budget,
            "integer_buffers": integer_buffers.value if integer_buffers else None,
            "allow_nonfinite": allow_nonfinite or None,
        },
    )
    if dry_run:
        show_plan(make_plan(spec))
        return
    try:
        done = merge_files(spec, force=force)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None
    show_done(done)


def explain(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, as of bd-merge merge.")],
    overrides: Overrides = None,
) -> None:
    """Print what each tensor of a merge will get: the method's parameters, or the base's value and why.

    \b
    Example:
      bd-merge explain merge.yaml parameters.keep=0.1
    """
    from pipeline.merge.assign import make_plan
    from pipeline.merge.show import show_plan
    from pipeline.merge.spec import load_spec

    show_plan(make_plan(load_spec(config, overrides or (), {})))


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="METHOD", help="Tell this method's formula and defaults.")
    ] = None,
) -> None:
    """List the merging methods: what each needs, costs, where it is from and its defaults.

    \b
    Example:
      bd-merge methods
      bd-merge methods ties
    """
    from pipeline.merge.show import show_method, show_methods

    if name is None:
        show_methods()
    else:
        show_method(name)
