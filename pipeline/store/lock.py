"""One writer a store: an exclusive file lock that dies with its holder and says who that is."""

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import ConfigError, StoreLocked

LOCK_NAME = ".lock"


@contextmanager
def hold(root: Path, purpose: str) -> Iterator[None]:
    """Hold the store while the block runs; `StoreLocked` names the holder when there is one.

    The kernel drops the lock when the process ends, however it ends, so a killed run leaves nothing to clean up.
    """
    path = root / LOCK_NAME
    try:
        root.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"store {root} cannot be written ({error.strerror}); name another with store=...") from None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise StoreLocked(f"store {root} is held by {_holder(file.read())}; wait for it, or end it") from error
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps({"host": platform.node(), "pid": os.getpid(), "since": since, "purpose": purpose}))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['purpose']})"
    except (ValueError, KeyError, TypeError):
        return "another process that did not leave its name"
