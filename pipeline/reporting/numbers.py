"""The numbers of a report, each with the store reference it was computed from."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.reporting.parts import Parts, reference


@dataclass
class Numbers:
    """Collected as the sections are written; what is on the page and what is in `report.json` are one value."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, value: float | int | str | None, *sources: str) -> None:
        """Record one number under a dotted name. A number without a source is our mistake."""
        assert sources, f"{name} has no source"
        # JSON has no nan: an undefined number is null, and stays visible as such.
        safe = None if isinstance(value, float) and not math.isfinite(value) else value
        self.values[name] = {"value": safe, "sources": list(dict.fromkeys(sources))}


def report_json(numbers: Numbers, parts: Parts, run_id: str, name: str, figures: Sequence[str]) -> str:
    """The text of `report.json`: numbers with sources, and for every source its full key and directory."""
    sources: dict[str, list[dict[str, str]]] = {
        reference(unit): [{"stage": unit.stage, "unit": unit.unit, "key": unit.key}] for unit in parts.everything()
    }
    for stage in parts.by_stage:
        if len(units := parts.units(stage)) != 1:
            sources[f"{stage}/*"] = [{"stage": u.stage, "unit": u.unit, "key": u.key} for u in units]
    content = {
        "schema": 1,
        "run_id": run_id,
        "name": name,
        "figures": sorted(figures),
        "numbers": dict(sorted(numbers.values.items())),
        "sources": dict(sorted(sources.items())),
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
