"""What the commands print, as rich tables."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.doctor import Finding
from pipeline.forecast import forecast_bytes
from pipeline.formats.predictions import Prediction
from pipeline.gc import Removed
from pipeline.plan import StagePlan, estimate, reason, walk
from pipeline.predict import Caller
from pipeline.record import RunRecord, read_record, run_ids
from pipeline.store import Manifest, Store
from pipeline.workflow import Workflow

CONSOLE = Console(soft_wrap=True)
REASONS_SHOWN = 2


def show_run(workflow: Workflow, record: RunRecord) -> None:
    """The result table of a finished run, and where report and tracker are."""
    from pipeline.compare import run_rows

    store = Store(workflow.store_path)
    artefacts = record.artefacts(store)
    rows = run_rows(artefacts)
    for protocol in dict.fromkeys(row.protocol for row in rows):
        table = Table(
            title=f"accuracy, {protocol.replace('_', '-')} (relative drop against clean)", title_justify="left"
        )
        shown = [row for row in rows if row.protocol == protocol]
        levels = list(shown[0].accuracy)
        for column in ("method", *levels):
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in shown:
            cells = [_cell(row.accuracy[level], row.relative_drop[level], level) for level in levels]
            table.add_row(row.title, *cells)
        CONSOLE.print(table)
    report = artefacts["report"][0]
    CONSOLE.print(f"report   {report.file('report.html')}")
    CONSOLE.print(f"tracking {record.tracked or 'not tracked; write it later with bd-merge track ' + record.run_id}")
    CONSOLE.print(f"run      {record.run_id}")
    total = [entry["wall_s"] for entry in record.timing if entry["stage"] == "total"]
    if total:
        CONSOLE.print(f"time     {total[0]:.0f} s")


def show_plan(workflow: Workflow) -> None:
    """A row a stage: units to run, units reused, why, and what it will take."""
    store = Store(workflow.store_path)
    history = [manifest for _, manifest in store.units()]
    told = forecast_bytes(workflow)
    table = Table(title=f"plan of {workflow.name} in {store.root}", title_justify="left")
    for column in ("stage", "run", "reuse", "seconds", "disk MiB", "memory MiB"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    table.add_column("why", overflow="fold")
    waiting: list[str] = []
    expected: list[str] = []
    for plan in walk(workflow.stages, store):
        name = plan.stage.name if isinstance(plan, StagePlan) else plan.name
        at_most = f"≈ {_or_unknown(_mib(told[name]), True)}".replace("≈ <", "<") if name in told else "?"
        if not isinstance(plan, StagePlan):
            after = next(need for need in plan.needs if need in waiting)
            table.add_row(name, "?", "?", "?", at_most, "?", f"after {after}")
            waiting.append(name)
            continue
        cost = estimate(plan, history, workflow.parallelism)
        needed = bool(plan.missing)
        if needed:
            waiting.append(name)
            if facts := plan.stage.expect([each.unit for each in plan.missing]):
                expected.append(f"{name} expects {', '.join(f'{key} {value}' for key, value in facts.items())}")
        table.add_row(
            name,
            str(len(plan.missing)),
            str(len(plan.found)),
            _or_unknown(cost.seconds, needed),
            at_most if needed and not cost.based_on else _or_unknown(_mib(cost.size_bytes), needed),
            _or_unknown(_mib(cost.memory_bytes), needed),
            _reasons(plan, history),
        )
    CONSOLE.print(table)
    for line in expected:
        CONSOLE.print(line, markup=False, highlight=False)
    CONSOLE.print(
        "Seconds, disk and memory are those of earlier units of the stage in this store. Where there are none, ≈ is\n"
        "the most that the size of images and models can come to, and ? is not known before."
    )


def _reasons(plan: StagePlan, history: Sequence[Manifest]) -> str:
    """Why the missing units must run, units with one reason together."""
    because: dict[str, list[str]] = {}
    for each in plan.missing:
        because.setdefault(reason(plan, each, history), []).append(each.unit.id)
    shown = []
    for why, units in list(because.items())[:REASONS_SHOWN]:
        others = f" and {len(units) - REASONS_SHOWN} more" if len(units) > REASONS_SHOWN else ""
        shown.append(f"{', '.join(units[:REASONS_SHOWN])}{others}: {why}")
    more = len(because) - len(shown)
    return "; ".join(shown) + (f"; and {more} more reasons" if more else "")


def show_status(store: Store) -> None:
    """A row a run."""
    table = Table(title=f"runs in {store.root}", title_justify="left")
    for column in ("run", "created", "finished", "stages", "units", "MiB"):
        table.add_column(column, justify="right" if column in ("stages", "units", "MiB") else "left", overflow="fold")
    sizes = {(m.stage, m.unit, m.key): m.size_bytes for _, m in store.units()}
    for run_id in run_ids(store):
        record = read_record(store, run_id)
        pins = [(stage, unit, key) for stage, units in record.stages.items() for unit, key in units.items()]
        held = [sizes[pin] for pin in pins if pin in sizes]
        finished = record.finished or "not yet; the same command resumes it"
        units = str(len(held)) if len(held) == len(pins) else f"{len(held)} of {len(pins)}"
        table.add_row(run_id, record.created, finished, str(len(record.stages)), units, f"{sum(held) / 2**20:.1f}")
    CONSOLE.print(table)
    CONSOLE.print(f"{len(sizes)} units, {sum(sizes.values()) / 2**20:.1f} MiB; `bd-merge gc` removes what no run pins")


def show_predictions(predictions: Sequence[Prediction], caller: Caller) -> None:
    """A row an image: what it is, how sure the model is, which experts it was merged from; rejects below."""
    table = Table(title=f"{caller.merged.title}, {caller.mode}", title_justify="left")
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    for column in ("probability", "uncertainty"):
        table.add_column(column, justify="right")
    table.add_column("weight of each expert", overflow="fold")
    called = [each for each in predictions if each.reject is None]
    for each in called:
        weights = " ".join(f"{name} {weight:.2f}" for name, weight in (each.weights or {}).items())
        numbers = (f"{each.probability:.3f}", "–" if each.uncertainty is None else f"{each.uncertainty:.3f}")
        table.add_row(escape(each.path), escape(str(each.prediction)), *numbers, escape(weights or "–"))
    CONSOLE.print(table)
    for each in predictions:
        if each.reject is not None:
            CONSOLE.print(f"rejected {each.path}: {each.reject}", markup=False, highlight=False)
    CONSOLE.print(f"{len(called)} predicted, {len(predictions) - len(called)} rejected")
    if (bound := caller.weight_error_bound()) is not None:
        CONSOLE.print(f"samples shared merged copies: no parameter lies further than {bound:.3g} from a sample's own")


def show_findings(findings: Sequence[Finding]) -> None:
    """A line a finding, and how many must be corrected."""
    for finding in findings:
        detail = finding.detail.replace("\n", "\n       ")
        CONSOLE.print(
            f"{'ok  ' if finding.healthy else 'FAIL'} {finding.what}: {detail}", markup=False, highlight=False
        )
    wrong = sum(not finding.healthy for finding in findings)
    CONSOLE.print(f"{wrong} of {len(findings)} must be corrected" if wrong else "everything is fine")


def show_removed(removed: Sequence[Removed], dry_run: bool) -> None:
    """A line a removed directory, and the sum."""
    for each in removed:
        CONSOLE.print(f"{each.path} ({each.size_bytes / 2**20:.1f} MiB): {each.why}", markup=False)
    verb = "would be removed" if dry_run else "removed"
    CONSOLE.print(f"{len(removed)} {verb}, {sum(each.size_bytes for each in removed) / 2**20:.1f} MiB")


def show_comparison(store: Store, runs: Sequence[str]) -> None:
    """Runs side by side."""
    from pipeline.compare import compare_runs, comparison_table

    records = [read_record(store, run_id) for run_id in runs]
    CONSOLE.print(comparison_table(compare_runs([(record, record.artefacts(store)) for record in records])))


def _cell(accuracy: float | None, drop: float | None, level: str) -> str:
    if accuracy is None or drop is None:
        return "–" if accuracy is None else f"{100 * accuracy:.1f}"
    return f"{100 * accuracy:.1f}" if level == "clean" else f"{100 * accuracy:.1f} ({-100 * drop:+.1f}%)"


def _mib(size_bytes: float | None) -> float | None:
    return None if size_bytes is None else size_bytes / 2**20


def _or_unknown(value: float | None, needed: bool) -> str:
    if not needed:
        return "0"
    return "?" if value is None else "< 0.1" if value < 0.05 else f"{value:.1f}"
