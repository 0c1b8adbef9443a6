"""What a store holds, to be compared between executors."""

from pipeline.store import Store

# Timings are in these and nowhere else.
TIMED = {"report.html", "report.json", "figures/timing.png", "figures/accuracy_against_cost.png"}


def contents(store: Store) -> dict[str, dict[str, str]]:
    """{stage/unit: {file: sha256}} of every unit, files that hold timings left out."""
    return {
        f"{m.stage}/{m.unit}": {name: each["sha256"] for name, each in m.files.items() if name not in TIMED}
        for _, m in store.units()
    }
