"""What is written down beside a merged model: of what it was made, how, when it took how much."""

import json
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from pipeline.formats.spans import OpenFile
from pipeline.merge.assign import Plan
from pipeline.merge.memory import WorkingSet

SCHEMA = 1


def note(plan: Plan) -> dict[str, str]:
    """What the output itself says of its making: the base's own notes and the method. Equal merges, equal notes."""
    settings = {group.pattern: dict(group.parameters) for group in plan.groups}
    made = {"method": plan.method.name, "groups": settings, "experts": len(plan.inputs.experts)}
    own = plan.inputs.base.files[0].metadata
    return {"format": "pt", **own, "bd_merge": json.dumps(made, sort_keys=True, default=str)}


def describe(
    plan: Plan,
    needed: WorkingSet,
    digests: Mapping[str, str],
    written: list[dict[str, object]],
    counts: Mapping[tuple[str, str], int],
    seconds: float,
) -> dict[str, Any]:
    """The manifest: what was merged, of what, how, and what came out."""
    spec, inputs = plan.spec, plan.inputs

    def told(files: Sequence[OpenFile]) -> list[dict[str, object]]:
        return [{"path": str(f.path), "bytes": f.size_bytes, "sha256": digests[str(f.path)]} for f in files]

    experts = [
        {"path": str(expert.path), "names": expert.naming, "files": told(expert.files)} for expert in inputs.experts
    ]
    base = {"path": str(inputs.base.path), "names": inputs.base.naming, "files": told(inputs.base.opened)}
    reasons = {reason: list(plan.copied.values()).count(reason) for reason in sorted(set(plan.copied.values()))}
    return {
        "schema": SCHEMA,
        "method": {"name": plan.method.name, "title": plan.method.title, "source": plan.method.source},
        "groups": [
            {"pattern": group.pattern, "tensors": len(group.names), "parameters": dict(group.parameters)}
            for group in plan.groups
        ],
        "seed": spec.seed,
        "include": list(spec.include),
        "exclude": list(spec.exclude),
        "integer_buffers": spec.integer_buffers,
        "allow_nonfinite": spec.allow_nonfinite,
        "non_finite": [{"path": path, "tensor": name, "entries": n} for (path, name), n in sorted(counts.items())],
        "base": base,
        "experts": experts,
        "tensors": {"merged": sum(len(group.names) for group in plan.groups), "copied": reasons},
        "output": {"files": written},
        "warnings": [*inputs.warnings, *_alike(base, experts)],
        "memory": {
            "budget_bytes": spec.memory_budget,
            "working_set_bytes": needed.bytes,
            # Of the process, with the files' pages it had mapped.
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        },
        "seconds": round(seconds, 3),
        "versions": {name: version(name) for name in ("bd-merging", "torch", "safetensors", "numpy")}
        | {"python": platform.python_version()},
        "command": sys.argv,
    }


def _alike(base: Mapping[str, Any], experts: list[dict[str, Any]]) -> list[str]:
    """Experts whose files are byte by byte the base's, or another expert's."""
    found = []
    seen = {tuple(file["sha256"] for file in base["files"]): (base["path"], "the base's")}
    for expert in experts:
        key = tuple(file["sha256"] for file in expert["files"])
        if key in seen and seen[key][0] != expert["path"]:
            found.append(f"expert {expert['path']} is byte by byte {seen[key][1]} {seen[key][0]}")
        seen.setdefault(key, (expert["path"], "the expert"))
    return found
