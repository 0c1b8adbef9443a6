"""Progress of a merge: one live line on a terminal, plain lines elsewhere."""

import io
import logging

import pytest

from pipeline.merge import progress as progress_module
from pipeline.merge.progress import MergeProgress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_one_line_that_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress_module, "LIVE_EVERY_S", 0.0)
    progress = MergeProgress("ties", 2)
    progress.step("one", 3 << 20)
    progress.step("two", 3 << 20)
    progress.phase("verifying")
    progress.clear()
    shown = terminal.getvalue()
    assert "\n" not in shown and shown.endswith("\r\x1b[K")
    assert "ties 1/2 tensors, 3.0 MiB, 0 s; one" in shown and "ties 2/2 tensors, 6.0 MiB, 0 s; verifying" in shown


def test_elsewhere_it_is_a_log_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    progress = MergeProgress("ties", 2)
    with caplog.at_level(logging.INFO):
        progress.step("one", 3 << 20)
        assert caplog.text == ""
        monkeypatch.setattr(progress_module, "PLAIN_EVERY_S", 0.0)
        progress.step("two", 3 << 20)
    assert "merge runs done=2/2 written=6.0MiB" in caplog.text
    progress.clear()
