"""The merge itself: lazy inputs to a method, its tensors to the output, hashes on the way, a manifest at the end."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from bd_core.task_vectors import same_integers
from pipeline import interrupts, logs
from pipeline.errors import ConfigError, DataError
from pipeline.merge.adapters import adapter_stream
from pipeline.merge.assign import INTEGER, Group, Plan, make_plan
from pipeline.merge.hashing import Hashing
from pipeline.merge.inputs import check_finite
from pipeline.merge.manifest import describe, note
from pipeline.merge.memory import OutOfMemory, WorkingSet, out_of_memory, working_set
from pipeline.merge.mended import mended, restored
from pipeline.merge.output import Output, check_target
from pipeline.merge.progress import MergeProgress
from pipeline.merge.spec import MergeSpec, human


@dataclass(frozen=True)
class Done:
    """A merge that is in its place, and what its manifest says."""

    output: Path
    manifest_path: Path
    manifest: Mapping[str, Any]


def merge_files(spec: MergeSpec, *, force: bool = False) -> Done:
    """Merge as `spec` says and return what was written. Raises ConfigError or DataError and leaves nothing behind."""
    began = perf_counter()
    plan = make_plan(spec)
    if spec.output is None:
        raise ConfigError("the merge has no output; name a file with -o, or `output` in the configuration")
    files = plan.inputs.files
    check_target(spec.output, plan.inputs.base, {file.path.resolve() for file in files}, force=force)
    needed = working_set(plan)
    needed.check(spec.memory_budget, spec.method)
    for warning in plan.inputs.warnings:
        logs.fact(f"warning: {warning}", level=30)
    check_integers(plan)
    counts: dict[tuple[str, str], int] = {}
    progress = MergeProgress(spec.method, len(plan.inputs.base.sources))
    # Chunks are worked on at the rate of memory: half the cores merge, while the others hash and write.
    cores = os.cpu_count() or 1
    merging = max(1, cores // 2) if plan.method.memory == "chunk" else cores
    output = Output(spec.output, plan.inputs.base, note(plan))
    try:
        with threads(merging), Hashing(files, cores) as hashing:
            output.open()
            for name, value in _named_faults(_tensors(plan, counts), plan, needed):
                interrupts.check()
                output.write(name, value)
                progress.step(name, value.numel() * value.element_size())
            progress.phase("verifying")
            written = output.finish()
            progress.phase("hashing the inputs")
            digests = hashing.digests()
            for file in files:
                file.check_unchanged()
            manifest = describe(plan, needed, digests, written, counts, perf_counter() - began)
            place = output.commit(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        if out_of_memory(error):
            raise _told(error, "the inputs", needed, spec) from None
        raise ConfigError(
            f"output {spec.output}: {error.strerror or error}; nothing was left behind, make room or choose another"
        ) from None
    finally:
        output.close()
        progress.clear()
    for warning in manifest["warnings"][len(plan.inputs.warnings) :]:
        logs.fact(f"warning: {warning}", level=30)
    return Done(spec.output, place, manifest)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch with so many threads at most, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_integers(plan: Plan) -> None:
    """Raise DataError where an expert's integer or boolean tensor is not the base's, unless these are to be taken."""
    if plan.spec.integer_buffers == "base":
        return
    wrong = []
    for name in (name for name, reason in plan.copied.items() if reason == INTEGER):
        origin = plan.inputs.base_state[name]
        wrong += [
            f"{name} ({str(origin.dtype).removeprefix('torch.')}) of {expert.path}"
            for expert in plan.inputs.experts
            if name in expert.state and not same_integers(name, expert.state[name], origin)
        ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(
            f"integer tensors cannot be merged and differ from the base's: {', '.join(wrong[:5])}{more}; give experts "
            "with the base's, or take the base's with --integer-buffers base"
        )


def _tensors(plan: Plan, counts: dict[tuple[str, str], int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the output by the base files' own names: first what is copied, then group after group."""
    base = plan.inputs.base
    ours = {source for part in base.parts.values() for source in part.sources}
    for own, source in base.sources.items():
        if own not in ours:  # beside the model's parameters, such as Hugging Face's position_ids
            yield own, source.read()
    for name in plan.copied:
        for own in base.parts[name].sources:
            value = base.sources[own].read()
            if not plan.spec.allow_nonfinite:
                check_finite(own, value, base.path)
            yield own, value
    for group in plan.groups:
        if plan.method.experts == "adapters":
            yield from adapter_stream(plan.method.name, plan.inputs, group.names, group.parameters)
            continue
        for name, value in _merged(plan, group, counts):
            part = base.parts[name]
            headers = [base.sources[own].header for own in part.sources]
            yield from zip(part.sources, part.take_apart(value.to(plan.header[name].dtype), headers), strict=True)


def _merged(plan: Plan, group: Group, counts: dict[tuple[str, str], int]) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors of a group under our names, in float32 where adapters are."""
    base = origin = plan.inputs.base_state.only(group.names)
    experts = [expert.state.only(group.names) for expert in plan.inputs.experts]
    if plan.spec.allow_nonfinite:
        titles = [str(expert.path) for expert in plan.inputs.experts]
        experts = [mended(state, origin, title, counts) for state, title in zip(experts, titles, strict=True)]
        base = mended(origin, None, str(plan.inputs.base.path), counts)
    waiting = set(group.names)
    # Not through `merge_stream`: names, shapes and dtypes were compared by the headers, without a tensor read.
    for name, value in plan.method.function(base, experts, **group.parameters):
        waiting.remove(name)
        yield name, restored(value, origin[name]) if plan.spec.allow_nonfinite else value
    assert not waiting, f"{plan.method.name} never gave {sorted(waiting)[:3]}"


def _named_faults(stream: Iterator[tuple[str, Tensor]], plan: Plan, needed: WorkingSet) -> Iterator[tuple[str, Tensor]]:
    """The stream, its errors told by the files' names."""
    last = "the first tensor"
    try:
        for name, value in stream:
            last = f"the tensor after {name}"
            yield name, value
    except ValueError as error:
        raise DataError(_by_file(str(error), plan)) from None
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise _told(error, last, needed, plan.spec) from None


def _by_file(message: str, plan: Plan) -> str:
    """A method's message with `expert 2` and `the base` as the files they are, and what to do about NaN."""
    experts = plan.inputs.experts

    def named(found: re.Match[str]) -> str:
        k = int(found[1])
        return f"expert {experts[k].path}" if k < len(experts) else found[0]

    told = re.sub(r"\bexpert (\d+)\b", named, message)
    told = re.sub(r"^the base:", f"base {plan.inputs.base.path}:", told)
    return f"{told}, or --allow-nonfinite" if re.search(r"\b(NaN|infinit)", told) else told


def _told(error: BaseException, where: str, needed: WorkingSet, spec: MergeSpec) -> OutOfMemory:
    asked = re.search(r"allocate (\d+) bytes", str(error))
    size = f" ({human(int(asked[1]))} asked for)" if asked else ""
    return OutOfMemory(
        f"out of memory at {where}{size}: {spec.method} was reckoned to take {human(needed.bytes)} at {needed.tensor}, "
        f"of --memory-budget {human(spec.memory_budget)}; set it to what is free, so that a merge that does not fit is "
        "refused before it begins, and give the process more memory or merge fewer experts at once"
    )
