"""The one loop over the stages: each begins when those it needs are done, and does what is missing."""

import shlex
import sys
from dataclasses import dataclass, field
from time import time
from typing import Any

from pipeline import interrupts, logs
from pipeline.errors import UnitsFailed
from pipeline.executors import Executor, Outcome
from pipeline.plan import StagePlan, plan_stage
from pipeline.progress import Progress
from pipeline.record import RunRecord, now, read_record, run_ids
from pipeline.stage import Stage
from pipeline.store import Artefact, Store, hold
from pipeline.timing import TOTAL, stage_times
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


@dataclass
class _Running:
    """A stage under way."""

    plan: StagePlan
    began: float
    to_do: int
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.artefact is None]


class _Run:
    def __init__(self, workflow: Workflow, store: Store, resume_command: str) -> None:
        self._workflow, self._store, self._resume_command = workflow, store, resume_command
        self._started = time()
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
        self._waiting: list[Stage] = list(workflow.stages)
        self._running: dict[str, _Running] = {}
        self._done: dict[str, list[Artefact]] = {}
        self._failed: list[_Running] = []

    def go(self) -> RunRecord:
        record = self._record
        try:
            self._begin_what_can()
            while self._running:
                self._take_one_outcome()
                interrupts.check()
                self._begin_what_can()
        finally:
            if self._executor is not None:
                self._executor.close()
        if self._failed:
            raise self._failure()
        if self._nothing_new():
            assert self._previous is not None
            logs.fact("nothing to do, every unit is in the store", run=record.run_id)
            return self._previous
        record.finished = now()
        record.write(self._store)
        began = time()
        record.tracked = self._workflow.track(record, record.artefacts(self._store))
        self._note("tracking", began)
        self._note(TOTAL, self._started)
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

    def _begin_what_can(self) -> None:
        """Begin every stage whose needs are met; none once a stage has failed."""
        for stage in list(self._waiting):
            if self._failed or any(name not in self._done for name in stage.needs):
                continue
            self._waiting.remove(stage)
            plan = plan_stage(stage, {name: self._done[name] for name in stage.needs}, self._store)
            # Pinned before its units are made: what is finished when the run dies is kept for the next attempt.
            self._record.stages[stage.name] = {each.unit.id: each.key for each in plan.planned}
            if plan.missing:
                self._begin(plan)
            else:
                self._done[stage.name] = plan.artefacts

    def _begin(self, plan: StagePlan) -> None:
        """Hand the missing units of one stage to the executor."""
        stage = plan.stage
        if expected := stage.expect([each.unit for each in plan.missing]):
            logs.fact(f"{stage.name} planned", **expected)
        self._set_damaged_aside(plan)
        self._record.write(self._store)
        if self._executor is None:
            began = time()
            self._executor = self._workflow.executor(self._store, self._record.run_id)
            self._note("executor start", began)
        running = _Running(plan, began=time(), to_do=len(plan.missing))
        self._running[stage.name] = running
        self._progress.begin(stage.name, stage.what, len(plan.planned), len(plan.found))
        self._executor.start(stage, plan.missing)
        if not self._waiting:
            self._workflow.warm_up_tracking()  # beside the last stage, which leaves the most memory and time

    def _take_one_outcome(self) -> None:
        assert self._executor is not None
        name, outcome = self._executor.wait()
        running = self._running[name]
        running.outcomes.append(outcome)
        if outcome.artefact is not None:
            running.plan.found[outcome.unit] = outcome.artefact
        self._progress.step(name, outcome.unit)
        if len(running.outcomes) < running.to_do:
            return
        del self._running[name]
        if running.failures:
            self._failed.append(running)
            self._drop_what_waits()
            return
        self._done[name] = artefacts = running.plan.artefacts
        self._progress.end(name, *(sum(int(a.report[count]) for a in artefacts) for count in ("rows_in", "rejected")))
        made = [outcome.artefact for outcome in running.outcomes if outcome.artefact is not None]
        self._note(name, running.began, **stage_times(made, self._started, len(artefacts)))

    def _drop_what_waits(self) -> None:
        """After a failure nothing else begins: stages whose last units were dropped are not under way any more."""
        assert self._executor is not None
        for name in self._executor.drop():
            self._running[name].to_do -= 1
        for name in [name for name, running in self._running.items() if len(running.outcomes) == running.to_do]:
            running = self._running.pop(name)
            if running.failures:
                self._failed.append(running)

    def _set_damaged_aside(self, plan: StagePlan) -> None:
        for each in plan.missing:
            directory = self._store.directory(plan.stage.name, each.unit.id, each.key)
            if directory.exists():
                moved = self._store.set_aside(directory)
                logs.fact("a damaged unit is set aside and made again", level=30, unit=directory.name, to=moved)

    def _note(self, stage: str, began: float, **facts: Any) -> None:
        """A row of the record: when this began, in seconds of the run, how long it took, and `facts`."""
        since, wall = began - self._started, time() - began
        self._record.timing.append({"stage": stage, "began_s": round(since, 3), "wall_s": round(wall, 3), **facts})
        self._workflow.timing[:] = self._record.timing

    def _failure(self) -> UnitsFailed:
        """What ends the run: the first stage that failed; of the others the log tells."""
        failed = self._failed[0]
        failures = failed.failures
        first = failures[0]
        shown = "\n  ".join(str(failure.log or "none, see above") for failure in failures[:5])
        more = f"\n  and {len(failures) - 5} more" if len(failures) > 5 else ""
        others = ", ".join(other.plan.stage.name for other in self._failed[1:])
        error = UnitsFailed(
            f"{failed.plan.stage.name}: {len(failures)} of {len(failed.outcomes)} units failed; first ({first.unit}): "
            f"{first.error}\nlogs:\n  {shown}{more}\n"
            + (f"units of {others} failed as well, see above\n" if others else "")
            + f"what succeeded is kept; resume with:\n  {self._resume_command}"
        )
        error.exit_code = max(failure.exit_code for each in self._failed for failure in each.failures)
        return error


def resume_command() -> str:
    """The command line of this process, as a user would type it again."""
    return shlex.join(["bd-merge", *sys.argv[1:]])
