"""The demo measured: cold, with models cached, and again; memory; overhead; who wins over several seeds; ablations.

python -m infra.bench.bench_demo times --save
python -m infra.bench.bench_demo accuracy --seeds 0 1 2 --save
python -m infra.bench.bench_demo ablations --seeds 0 1 2 --save
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from infra.bench.process_tree import Measured, measure
from pipeline.reporting.style import METHOD_LINES
from pipeline.timing import read_timing, spent

CONFIG = "configs/demo.yaml"
RESULTS = Path(__file__).parent / "results"
MODEL_STAGES = ("shard", "base", "experts")
LIMITS = {"cold": 600.0, "models cached": 180.0, "second run": 5.0, "--help": 1.0}
MEMORY_LIMIT_GIB = 4.0
OVERHEAD_LIMIT = 0.25
SHIFTED = ("L1", "L2", "L3")
OURS, RIVALS = "bd_layer", ("task_arithmetic", "ties", "adamerging", "twin_merging")
ABLATIONS: dict[str, tuple[str, ...]] = {
    "demo": (),
    "without-information": ("fit_router.information_weight=0",),
    "without-contrast": ("fit_router.contrastive_weight=0",),
    "without-both": ("fit_router.information_weight=0", "fit_router.contrastive_weight=0"),
    "contrast-tenfold": ("fit_router.contrastive_weight=1",),
}
VERSIONED = ("torch", "ray", "open_clip_torch", "mlflow", "numpy")


def main() -> None:
    """Measure, print, and save where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("times", "accuracy", "ablations"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--save", action="store_true", help="write infra/bench/results/demo_<what>_<machine>_<date>.md")
    parser.add_argument(
        "--keep", type=Path, help="keep the stores below this directory; finished ones are not run again"
    )
    arguments = parser.parse_args()
    root = arguments.keep or Path(tempfile.mkdtemp(prefix="bench-demo-"))
    if arguments.what == "times":
        lines = _times(root, arguments.seeds[0])
    else:
        lines = (_accuracy if arguments.what == "accuracy" else _ablations)(root, arguments.seeds)
    text = "\n".join([*_header(arguments.what, arguments.seeds), *lines]) + "\n"
    sys.stdout.write(text)
    if arguments.save:
        name = f"demo_{arguments.what}_{platform.machine()}-{_cpus()}cores_{time.strftime('%Y%m%d')}.md"
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / name).write_text(text, encoding="utf-8")
    if arguments.keep is None:
        shutil.rmtree(root)


def _accuracy(root: Path, seeds: Sequence[int]) -> list[str]:
    """One run a seed: other models, other fits, the same images and corruptions."""
    for seed in seeds:
        _checked(measure(_run(root / f"seed{seed}", f"seed={seed}")))
    return _table(root, seeds)


def _ablations(root: Path, seeds: Sequence[int]) -> list[str]:
    """The routers fitted again without one of their losses each, on the same models, pairs and images."""
    lines = [
        "## Ablations, task known, mean over the tasks, mean ± sd over the seeds",
        "",
        "| fit_router | variant | clean | L1 | L2 | L3 | mean L1-L3 | minus default, by seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    default: dict[str, list[float]] = {}
    for name, overrides in ABLATIONS.items():
        for seed in seeds:
            _checked(measure(_run(root / f"seed{seed}", f"seed={seed}", f"name={name}", *overrides)))
        by_seed = [_accuracies(root / f"seed{seed}", name) for seed in seeds]
        for variant in (OURS, "bd_task"):
            cells = [[100 * found[variant]["levels"][level] for found in by_seed] for level in ("clean", *SHIFTED)]
            cells.append([_shifted(found[variant]) for found in by_seed])
            gaps = [
                mine - theirs for mine, theirs in zip(cells[-1], default.setdefault(variant, cells[-1]), strict=True)
            ]
            said = ", ".join(o.removeprefix("fit_router.") for o in overrides) or "as configured"
            shown = [*(_spread(cell) for cell in cells), ", ".join(f"{gap:+.1f}" for gap in gaps)]
            lines.append(f"| {said} | {by_seed[0][variant]['title']} | {' | '.join(shown)} |")
    return lines


def _times(root: Path, seed: int) -> list[str]:
    """Cold, second, models cached and --help, on the first seed."""
    store, cached = root / f"seed{seed}", root / "cached"
    rows: dict[str, Measured] = {"cold": _checked(measure(_run(store, f"seed={seed}")))}
    rows["second run"] = _checked(measure(_run(store, f"seed={seed}")))
    for stage in MODEL_STAGES:
        shutil.copytree(store / stage, cached / stage)
    rows["models cached"] = _checked(measure(_run(cached, f"seed={seed}")))
    rows["--help"] = _checked(measure([sys.executable, "-m", "pipeline", "--help"]))
    lines = ["## Time and memory", "", "| run | seconds | target | peak memory GiB |", "|---|---|---|---|"]
    for name, measured in rows.items():
        memory = f"{measured.peak_bytes / 2**30:.2f}" if name in ("cold", "models cached") else ""
        lines.append(f"| {name} | {measured.wall_s:.1f} | < {LIMITS[name]:g} | {memory} |")
    return [*lines, "", f"Peak memory must stay below {MEMORY_LIMIT_GIB:g} GiB.", "", *_overhead(store)]


def _overhead(store: Path) -> list[str]:
    """Where the cold run's time went, by the run's own record."""
    where = spent(read_timing(_record(store)["timing"]))
    lines = ["## Where the cold run's time went", "", "| what | seconds | share |", "|---|---|---|"]
    lines += [
        f"| {name} | {seconds:.1f} | {seconds / where.total_s:.1%} |"
        for name, seconds in (("a forward or backward pass runs", where.passes_s), *where.others)
    ]
    lines += ["", f"While no pass runs: {where.overhead_share:.1%} (target: at most {OVERHEAD_LIMIT:.0%}).", ""]
    return lines


def _table(root: Path, seeds: Sequence[int]) -> list[str]:
    """Mean accuracy over tasks, per level and over L1-L3, mean and standard deviation over the seeds."""
    lines: list[str] = []
    for protocol, said in (("task_known", "task known"), ("task_free", "task not known")):
        by_seed = [_accuracies(root / f"seed{seed}", protocol=protocol) for seed in seeds]
        lines += [
            f"## Accuracy, {said}, mean over the tasks, mean ± sd over seeds {', '.join(map(str, seeds))}",
            "",
            "| method | clean | L1 | L2 | L3 | mean L1-L3 |",
            "|---|---|---|---|---|---|",
        ]
        for model, first in by_seed[0].items():
            cells = [[100 * found[model]["levels"][level] for found in by_seed] for level in ("clean", *SHIFTED)]
            cells.append([_shifted(found[model]) for found in by_seed])
            lines.append(f"| {first['title']} | " + " | ".join(_spread(cell) for cell in cells) + " |")
        lines += ["", f"{by_seed[0][OURS]['title']} minus, in points of the mean over L1-L3, seed by seed:", ""]
        for rival in RIVALS:
            gaps = [_shifted(found[OURS]) - _shifted(found[rival]) for found in by_seed]
            lines.append(f"- {by_seed[0][rival]['title']}: {', '.join(f'{gap:+.1f}' for gap in gaps)}")
        lines.append("")
    return lines


def _accuracies(store: Path, name: str = "demo", protocol: str = "task_known") -> dict[str, dict[str, Any]]:
    """{model: title and mean accuracy by level}, in the order of the report; models without the protocol left out."""
    found = {}
    for model, key in _record(store, name)["stages"]["evaluate"].items():
        metrics = json.loads((store / "evaluate" / f"{model}-{key[:12]}" / "metrics.json").read_text())
        levels = metrics["protocols"][protocol]
        if levels is not None:
            found[model] = {
                "title": metrics["title"],
                "levels": {level: levels[level]["mean"]["accuracy"] for level in levels},
            }
    ordered = [model for model in METHOD_LINES if model in found]
    return {model: found[model] for model in ordered + [model for model in found if model not in ordered]}


def _record(store: Path, name: str = "demo") -> dict[str, Any]:
    (path,) = (path for path in store.glob("runs/*/run.json") if path.parent.name.rpartition("-")[0] == name)
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def _shifted(found: dict[str, Any]) -> float:
    return float(100 * statistics.mean(found["levels"][level] for level in SHIFTED))


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def _run(store: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", "run", CONFIG, f"store={store}", *overrides]


def _checked(measured: Measured) -> Measured:
    if measured.returncode:
        raise SystemExit(f"the command failed with {measured.returncode}:\n{measured.output}")
    return measured


def _header(what: str, seeds: Sequence[int]) -> list[str]:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in VERSIONED)
    command = f"python -m infra.bench.bench_demo {what} --seeds {' '.join(map(str, seeds))} --save"
    return [
        "# The demo, measured",
        "",
        f"Command: `{command}`, {time.strftime('%Y-%m-%d')}, {platform.machine()}, {_cpus()} cores, no GPU, load "
        f"average {os.getloadavg()[2]:.1f} over the last 15 minutes (1 to 2 is the run itself).",
        f"Python {platform.python_version()}, {versions}.",
        "",
    ]


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
