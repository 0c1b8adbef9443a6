"""One unit, from its key to its commit: what every executor calls, wherever it runs it."""

import errno
import os
import random
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, time
from typing import Protocol

from pipeline import logs
from pipeline.errors import BDMergeError
from pipeline.stage import Stage, StageReport, Unit
from pipeline.store import Artefact, Store, commit
from pipeline.training.context import TrainingContext
from pipeline.training.fit_stage import FitStage


@dataclass(frozen=True)
class Planned:
    """A unit with its key."""

    unit: Unit
    key: str


@dataclass(frozen=True)
class Outcome:
    """How one unit ended: with an artefact, or with an error and the log that tells more."""

    unit: str
    artefact: Artefact | None = None
    error: str | None = None
    log: Path | None = None
    exit_code: int = 1


class Executor(Protocol):
    """Does units of any number of stages and tells of each as it ends; a failing unit does not stop its siblings."""

    def start(self, stage: Stage, planned: Sequence[Planned]) -> None:
        """Take on every unit of `planned`."""
        ...

    def wait(self) -> tuple[str, Outcome]:
        """The stage's name and the outcome of the next unit to end, of those taken on."""
        ...

    def drop(self) -> list[str]:
        """Give up units that have not begun; the stage's name for each."""
        ...

    def close(self) -> None:
        """Release everything the executor started."""
        ...


@dataclass
class UnitRunner:
    """Runs units in this process, setting a stage up once and keeping only the last one."""

    store: Store
    run_id: str
    context: TrainingContext | None = None
    _ready: Stage | None = field(default=None, init=False)
    _token: str = field(default="", init=False)

    def __call__(self, stage: Stage, planned: Planned, token: str) -> Outcome:
        """The outcome of one unit. `token` names the stage of this run: equal tokens share one `setup`."""
        try:
            return Outcome(planned.unit.id, artefact=self._commit(stage, planned, token))
        # One of the two places that catch everything: a unit's failure is reported, its siblings go on.
        except Exception as error:  # noqa: BLE001
            return failed(self.store, self.run_id, stage.name, planned.unit.id, error)

    def _commit(self, stage: Stage, planned: Planned, token: str) -> Artefact:
        _pin_threads(stage.resources.threads, planned.key)
        began, start = time(), perf_counter()
        if self._token != token:
            self._ready, self._token = None, ""  # the last stage's model is released before the next is loaded
            stage.setup(planned.unit)
            self._ready, self._token = stage, token
        ready, setup_s = self._ready, perf_counter() - start
        assert ready is not None
        unit = planned.unit

        def produce(directory: Path) -> StageReport:
            report = self._process(ready, unit, directory)
            assert report.rows_in == report.rows_out + report.rejected, f"{stage.name} {unit.id} lost rows: {report}"
            report.took("setup", began, setup_s)
            return report

        return commit(
            self.store,
            produce,
            stage=stage.name,
            unit=unit.id,
            key=planned.key,
            version=stage.version,
            seed=stage.seed,
            spec=stage.hashed_spec(),
            settings=dict(unit.settings),
            inputs=[[f"{a.stage}/{a.unit}", a.digest] for a in unit.inputs],
        )

    def _process(self, stage: Stage, unit: Unit, directory: Path) -> StageReport:
        if self.context is not None and isinstance(stage, FitStage):
            return stage.fit(unit, directory, self.context)
        return stage.process(unit, directory)

    def accompany(self, stage: Stage, planned: Planned) -> Outcome | None:
        """Fit beside the worker that commits: the same steps, nothing kept. An outcome only when it failed."""
        try:
            _pin_threads(stage.resources.threads, planned.key)
            stage.setup(planned.unit)
            with tempfile.TemporaryDirectory() as directory:
                self._process(stage, planned.unit, Path(directory))
        except Exception as error:  # noqa: BLE001 - the same edge as above, on another worker
            return failed(self.store, self.run_id, stage.name, planned.unit.id, error)
        return None


def failed(store: Store, run_id: str, stage: str, unit: str, error: BaseException) -> Outcome:
    """The outcome of a unit that raised; the traceback goes to its log file."""
    message = str(error) if isinstance(error, BDMergeError) else f"{type(error).__name__}: {error}"
    if _is_short_write(error):
        message += f" ({os.strerror(errno.ENOSPC)})"
    if _is_disk_full(error):
        message += f"; make room in {store.root} (`bd-merge gc --store {store.root}` removes what no run needs)"
    logs.fact(f"{stage} {unit} failed", level=40, error=message)
    text = "".join(traceback.format_exception(error))
    log: Path | None = store.log_path(run_id, stage, unit)
    assert log is not None
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(text, encoding="utf-8")
    except OSError as unwritten:
        # The disk that failed the unit may well refuse its log too; the siblings still get their turn.
        logs.fact(f"its log cannot be written to {log}", level=40, error=unwritten, traceback=text)
        log = None
    return Outcome(unit, error=message, log=log, exit_code=getattr(error, "exit_code", 1))


def _is_disk_full(error: BaseException) -> bool:
    """By number where the error has one; FAISS and safetensors only quote the system's words."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    quoted = any(os.strerror(number) in str(error) for number in full)
    return getattr(error, "errno", None) in full or quoted or _is_short_write(error)


def _is_short_write(error: BaseException) -> bool:
    """NumPy's way to say that a disk took less than it was given; it keeps the system's number to itself."""
    return isinstance(error, OSError) and " requested and " in str(error) and str(error).endswith(" written")


def _pin_threads(threads: int, key: str) -> None:
    """Fix what could make equal inputs give other bytes: thread count, and global generators a library may use."""
    import numpy as np
    import torch

    seed = int(key[:8], 16)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
