"""What will run and why: the units of a stage, which of them the store holds, and what the others will cost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.executors import Planned
from pipeline.stage import Inputs, Stage
from pipeline.store import Artefact, Manifest, Store


@dataclass
class StagePlan:
    """The units of one stage: those the store holds, and those still to do."""

    stage: Stage
    planned: list[Planned]
    found: dict[str, Artefact] = field(default_factory=dict)

    @property
    def missing(self) -> list[Planned]:
        """Units that must run."""
        return [each for each in self.planned if each.unit.id not in self.found]

    @property
    def artefacts(self) -> list[Artefact]:
        """All units in order; only when none is missing."""
        return [self.found[each.unit.id] for each in self.planned]


def plan_stage(stage: Stage, inputs: Inputs, store: Store) -> StagePlan:
    """The plan of one stage whose inputs are all committed."""
    planned = [Planned(unit, stage.key(unit)) for unit in stage.units(inputs)]
    names = [each.unit.id for each in planned]
    assert len(set(names)) == len(names), f"{stage.name}: unit ids repeat: {names}"
    plan = StagePlan(stage, planned)
    for each in planned:
        artefact = store.find(stage.name, each.unit.id, each.key)
        if artefact is not None:
            plan.found[each.unit.id] = artefact
    return plan


def walk(stages: Sequence[Stage], store: Store) -> Iterator[StagePlan | Stage]:
    """Each stage's plan in order, as far as the store allows.

    A stage that needs one with missing units cannot be planned yet and is given as it is.
    """
    done: dict[str, list[Artefact]] = {}
    for stage in stages:
        if any(name not in done for name in stage.needs):
            yield stage
            continue
        plan = plan_stage(stage, {name: done[name] for name in stage.needs}, store)
        if not plan.missing:
            done[stage.name] = plan.artefacts
        yield plan


@dataclass(frozen=True)
class Estimate:
    """What a stage's missing units will cost, from what units of the same stage cost before; None where none did."""

    seconds: float | None
    size_bytes: float | None
    memory_bytes: float | None
    based_on: int


def estimate(plan: StagePlan, history: Sequence[Manifest], parallelism: int) -> Estimate:
    """Mean cost of earlier units of this stage, times the missing ones, over `parallelism`."""
    earlier = [manifest for manifest in history if manifest.stage == plan.stage.name]
    if not earlier:
        return Estimate(None, None, None, 0)
    lanes = max(1, min(parallelism, len(plan.missing), int(parallelism // max(plan.stage.resources.cpus, 1)) or 1))
    mean_s = sum(float(m.made.get("process_s", 0.0)) for m in earlier) / len(earlier)
    mean_bytes = sum(m.size_bytes for m in earlier) / len(earlier)
    peak = max(float(m.made.get("peak_memory_bytes", 0)) for m in earlier) * lanes
    return Estimate(mean_s * len(plan.missing) / lanes, mean_bytes * len(plan.missing), peak or None, len(earlier))


def reason(plan: StagePlan, planned: Planned, history: Sequence[Manifest]) -> str:
    """Why this unit must run: what differs from the unit of that name that the store holds."""
    earlier = [m for m in history if m.stage == plan.stage.name and m.unit == planned.unit.id]
    if not earlier:
        return "never made"
    if any(m.key == planned.key for m in earlier):
        return "its files are damaged"
    differences: list[list[str]] = [_differences(plan.stage, planned, manifest) for manifest in earlier]
    closest: list[str] = min(differences, key=lambda found: len(found))
    return "; ".join(closest) or "its settings changed"


def _differences(stage: Stage, planned: Planned, manifest: Manifest) -> list[str]:
    found = []
    if manifest.version != stage.version:
        found.append(f"stage version {manifest.version} -> {stage.version}")
    if manifest.seed != stage.seed:
        found.append(f"seed {manifest.seed} -> {stage.seed}")
    found += _changed("", manifest.spec, stage.hashed_spec())
    found += _changed("settings.", manifest.settings, dict(planned.unit.settings))
    before = {name: digest for name, digest in manifest.inputs}
    now = {f"{a.stage}/{a.unit}": a.digest for a in planned.unit.inputs}
    changed = [name for name in now if before.get(name) != now[name]] + [name for name in before if name not in now]
    if changed:
        found.append(f"other input {', '.join(changed[:3])}" + (f" and {len(changed) - 3} more" if changed[3:] else ""))
    return found


def _changed(prefix: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = sorted({*before, *now})
    return [
        f"{prefix}{key} {_brief(before.get(key))} -> {_brief(now.get(key))}"
        for key in keys
        if before.get(key) != now.get(key)
    ]


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
