"""The command line in this process: what a test wants to know of a command, without three seconds of imports."""

import contextlib
import io
import sys
from dataclasses import dataclass

import pytest

from pipeline import cli, logs


@dataclass(frozen=True)
class Ended:
    """How a command ended, and all it printed on both streams."""

    exit_code: int
    output: str

    @property
    def is_clear_refusal(self) -> bool:
        """Exit code 2 and a message of ours: no traceback."""
        return self.exit_code == 2 and "bd-merge: " in self.output and "Traceback" not in self.output


def bd_merge(*arguments: object) -> Ended:
    """`bd-merge ARGUMENTS...`."""
    output = io.StringIO()
    logs.LOGGER.handlers.clear()  # the one of an earlier command writes to another stream
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        patch.setattr(sys, "argv", ["bd-merge", *map(str, arguments)])
        patch.setattr("signal.signal", lambda *_: None)  # the test run keeps its own handlers
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            cli.main()
    logs.LOGGER.handlers.clear()
    return Ended(int(end.value.code or 0), output.getvalue())
