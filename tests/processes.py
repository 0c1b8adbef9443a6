"""The command line in processes of its own, which can be killed.

They are forked from a server that has imported the pipeline once, so that a command costs its work and not its imports.
"""

import multiprocessing
import os
import resource
import signal
import sys
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "processes",
        "pipeline.cli",
        "pipeline.doctor",
        "pipeline.gc",
        "pipeline.reporting",
        "pipeline.run",
        "pipeline.workflow",
        "pipeline.backbones.open_clip",
        "faiss",
        "imagecorruptions",
        "open_clip",
    ]
)
DEADLINE_S = 120.0


@dataclass(frozen=True)
class Ended:
    """How a command ended, and all it printed."""

    exit_code: int
    output: str


class Command:
    """`bd-merge ARGUMENTS...`, started; what it prints goes to `output`."""

    def __init__(self, *arguments: object, output: Path, file_size_limit: int | None = None) -> None:
        self._output = output
        self.process: ForkServerProcess = CONTEXT.Process(
            target=_bd_merge, args=([str(argument) for argument in arguments], output, file_size_limit)
        )
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> Ended:
        """Wait for the end; a command that hangs is killed and fails the test."""
        self.process.join(DEADLINE_S)
        hung = self.process.is_alive()
        if hung:
            self.process.kill()
            self.process.join()
        output, exit_code = self._output.read_text(encoding="utf-8"), self.process.exitcode
        self.process.close()
        assert not hung, f"still running after {DEADLINE_S:.0f} s:\n{output}"
        assert exit_code is not None
        return Ended(exit_code, output)


def bd_merge(*arguments: object, output: Path, file_size_limit: int | None = None) -> Ended:
    """The command, run to its end."""
    return Command(*arguments, output=output, file_size_limit=file_size_limit).end()


def _bd_merge(arguments: list[str], output: Path, file_size_limit: int | None) -> None:
    from pipeline.cli import main

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # A test runner may have replaced the streams; the command must write where file descriptors 1 and 2 lead.
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ["COLUMNS"] = "200"  # read when `pipeline.show` is imported, so that one is not among the preloaded
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    if file_size_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    sys.argv = ["bd-merge", *arguments]
    main()
