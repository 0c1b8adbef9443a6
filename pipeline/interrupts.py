"""Ctrl-C, and the SIGTERM by which a job system ends a job: raised at once, and remembered.

Python raises in whatever the main thread is doing. Where that is a finaliser or a callback of a library, the exception
is printed and dropped; long work therefore asks again at its next safe place.
"""

import signal

_asked = False


def listen() -> None:
    """From now on both signals raise KeyboardInterrupt; one that the caller had ignored (nohup) stays so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def check() -> None:
    """Raise KeyboardInterrupt if either signal has come, whatever became of the exception that it raised then."""
    if _asked:
        raise KeyboardInterrupt


def _interrupt(*_: object) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt
