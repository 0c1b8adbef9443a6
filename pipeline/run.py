"""The one loop that walks the stages and does what is missing."""

import shlex
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

from pipeline import logs
from pipeline.errors import UnitsFailed
from pipeline.executors import Executor, Outcome
from pipeline.plan import StagePlan, walk
from pipeline.progress import Progress
from pipeline.record import RunRecord, now, read_record, run_ids
from pipeline.store import Store, hold
from pipeline.workflow import Workflow


def run(workflow: Workflow, resume_command: str) -> RunRecord:
    """The record of the finished run: every stage's missing units done, everything pinned and tracked.

    A failing unit does not stop its siblings; the stage then fails as a whole with `UnitsFailed`, which holds the
    count, the first message, the logs and `resume_command`.
    """
    store = Store(workflow.store_path)
    with hold(store.root, resume_command):
        orphans = store.sweep()
        if orphans:
            logs.fact("swept what an interrupted run left", directories=orphans)
        return _Run(workflow, store, resume_command).go()


class _Run:
    def __init__(self, workflow: Workflow, store: Store, resume_command: str) -> None:
        self._workflow, self._store, self._resume_command = workflow, store, resume_command
        self._record = RunRecord.begin(workflow.name, workflow.described(), workflow.hashed())
        known = ("run_id", "name", "created", "git", "versions", "config")
        workflow.about.update({name: getattr(self._record, name) for name in known})
        self._previous = read_record(store, self._record.run_id) if self._record.run_id in run_ids(store) else None
        if self._previous is not None:
            # What this run pinned before stays pinned until its stage is reached again: `gc` between two attempts
            # must not take what the next one will use.
            self._record.stages = dict(self._previous.stages)
        self._executor: Executor | None = None
        self._progress = Progress()
        self._started = perf_counter()

    def go(self) -> RunRecord:
        record = self._record
        try:
            for plan in walk(self._workflow.stages, self._store, self._complete):
                assert isinstance(plan, StagePlan)
                self._pin(plan)
        finally:
            if self._executor is not None:
                self._executor.close()
        if self._nothing_new():
            assert self._previous is not None
            logs.fact("nothing to do, every unit is in the store", run=record.run_id)
            return self._previous
        record.finished = now()
        record.write(self._store)
        began = perf_counter()
        record.tracked = self._workflow.track(record, record.artefacts(self._store))
        self._note("tracking", wall_s=perf_counter() - began)
        self._note("total", wall_s=perf_counter() - self._started)
        record.write(self._store)
        return record

    def _nothing_new(self) -> bool:
        previous = self._previous
        return (
            previous is not None
            and previous.finished is not None
            and previous.stages == self._record.stages
            and (previous.tracked is not None or not self._workflow.tracks)
        )

    def _complete(self, plan: StagePlan) -> None:
        """Do the missing units of one stage."""
        stage = plan.stage
        began = perf_counter()
        self._set_damaged_aside(plan)
        # Pinned before they are made: what is finished when the run dies is kept for the next attempt.
        self._pin(plan)
        self._record.write(self._store)
        if self._executor is None:
            self._executor = self._workflow.executor(self._store, self._record.run_id)
            self._note("executor start", wall_s=perf_counter() - began)
            began = perf_counter()
        outcomes: list[Outcome] = []
        self._progress.begin(stage.name, stage.what, len(plan.planned), len(plan.found))
        self._executor.run(stage, plan.missing, self._each(plan, outcomes))
        failures = [outcome for outcome in outcomes if outcome.artefact is None]
        if failures:
            raise self._failure(stage.name, len(outcomes), failures)
        made = [outcome.artefact for outcome in outcomes if outcome.artefact is not None]
        rows, rejected = (sum(int(a.report[name]) for a in plan.artefacts) for name in ("rows_in", "rejected"))
        self._progress.end(rows, rejected)
        spans: dict[str, float] = {}
        for artefact in made:
            for name, seconds in artefact.report["seconds"].items():
                spans[name] = spans.get(name, 0.0) + seconds
        self._note(
            stage.name,
            units=len(plan.planned),
            reused=len(plan.planned) - len(made),
            wall_s=perf_counter() - began,
            busy_s=sum(artefact.made["process_s"] for artefact in made),
            commit_s=sum(artefact.made["commit_s"] for artefact in made),
            lanes=min(len(made), max(1, int(self._executor.parallelism // max(1.0, stage.resources.cpus)))),
            spans=spans,
            # The stage takes as long as its slowest unit at least, whatever the other lanes do meanwhile.
            slowest_spans=max(made, key=lambda artefact: float(artefact.made["process_s"])).report["seconds"],
            bytes=sum(artefact.size_bytes for artefact in plan.artefacts),
        )

    def _pin(self, plan: StagePlan) -> None:
        self._record.stages[plan.stage.name] = {each.unit.id: each.key for each in plan.planned}

    def _each(self, plan: StagePlan, outcomes: list[Outcome]) -> Callable[[Outcome], None]:
        def done(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if outcome.artefact is not None:
                plan.found[outcome.unit] = outcome.artefact
            self._progress.step(outcome.unit)

        return done

    def _set_damaged_aside(self, plan: StagePlan) -> None:
        for each in plan.missing:
            directory = self._store.directory(plan.stage.name, each.unit.id, each.key)
            if directory.exists():
                moved = self._store.set_aside(directory)
                logs.fact("a damaged unit is set aside and made again", level=30, unit=directory.name, to=moved)

    def _note(self, stage: str, **facts: Any) -> None:
        self._record.timing.append({"stage": stage, **facts})
        self._workflow.timing[:] = self._record.timing

    def _failure(self, stage: str, total: int, failures: list[Outcome]) -> UnitsFailed:
        first = failures[0]
        shown = "\n  ".join(str(failure.log or "none, see above") for failure in failures[:5])
        more = f"\n  and {len(failures) - 5} more" if len(failures) > 5 else ""
        error = UnitsFailed(
            f"{stage}: {len(failures)} of {total} units failed; first ({first.unit}): {first.error}\n"
            f"logs:\n  {shown}{more}\nwhat succeeded is kept; resume with:\n  {self._resume_command}"
        )
        error.exit_code = max(failure.exit_code for failure in failures)
        return error


def resume_command() -> str:
    """The command line of this process, as a user would type it again."""
    return shlex.join(["bd-merge", *sys.argv[1:]])
