"""What each method cost, from the units it was made by: seconds, memory, and the price of one sample."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.store import Artefact, Manifest

# What every method is given, and no method pays for.
GIVEN = ("shard", "base", "experts", "embed")
MODELS = ("baselines", "surgery", "export")
PEAK_MEMORY, PRICE = "peak_memory_bytes", "price_per_sample"
WATCHED = ("merge", "search", "forward", "forward_backward")


@dataclass(frozen=True)
class Cost:
    """Of one method, made by `units`: those between what every method is given and its evaluation.

    `seconds` are those of each merge or fit itself where it was watched, of the whole unit elsewhere. `memory_bytes`
    is the most that one of them held beyond its inputs, `price` the seconds of one sample by those of the plain model,
    1 for any single set of weights. None: not measured.
    """

    seconds: float
    memory_bytes: float | None
    price: float | None
    units: tuple[Artefact, ...]


def read_costs(artefacts: Mapping[str, Sequence[Artefact]]) -> dict[str, Cost]:
    """{model: its cost} of every evaluated model that some unit made."""
    evaluated = {unit.unit: unit for unit in artefacts.get("evaluate", ())}
    by_name = {f"{unit.stage}/{unit.unit}": unit for units in artefacts.values() for unit in units}
    made = {unit.unit: unit for stage in MODELS for unit in artefacts.get(stage, ())}
    return {name: _cost(made[name], evaluated[name], by_name) for name in evaluated if name in made}


def _cost(model: Artefact, evaluated: Artefact, by_name: Mapping[str, Artefact]) -> Cost:
    units = _line(model, by_name)
    memory = [float(_metrics(unit)[PEAK_MEMORY]) for unit in units if PEAK_MEMORY in _metrics(unit)]
    price = _metrics(evaluated).get(PRICE)
    return Cost(
        seconds=sum(_seconds(unit) for unit in units),
        memory_bytes=max(memory, default=None),
        price=1.0 if price is None else float(price),
        units=(*units, evaluated),
    )


def _seconds(unit: Artefact) -> float:
    if PEAK_MEMORY not in _metrics(unit):
        return float(unit.made["process_s"])
    return sum(float(seconds) for kind, seconds in unit.report["seconds"].items() if kind in WATCHED)


def _line(model: Artefact, by_name: Mapping[str, Artefact]) -> list[Artefact]:
    """The unit and everything it was made from, back to what every method is given; each once."""
    found: dict[str, Artefact] = {}
    waiting = [model]
    while waiting:
        unit = waiting.pop()
        name = f"{unit.stage}/{unit.unit}"
        if name in found or unit.stage in GIVEN:
            continue
        found[name] = unit
        waiting += [by_name[source] for source, _ in Manifest.read(unit.path).inputs if source in by_name]
    return list(found.values())


def _metrics(unit: Artefact) -> Mapping[str, float]:
    return unit.report.get("metrics") or {}
