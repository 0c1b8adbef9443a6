"""The two errors a user can cause, and the one that reports failed units. Messages hold value, place and next step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class BDMergeError(Exception):
    """Any error of ours that the command line prints without a traceback."""

    exit_code = 1


class ConfigError(BDMergeError):
    """The user's mistake: a configuration, path or option that cannot work as given."""

    exit_code = 2


class SeveralFaults(ConfigError):
    """Several of the user's mistakes, each told on its own line."""

    def __init__(self, parts: Sequence[BDMergeError]) -> None:
        super().__init__(f"{len(parts)} faults\n" + "\n".join(f"- {part}" for part in parts))
        self.parts = tuple(parts)


class DataError(BDMergeError):
    """Bad data: a checkpoint, image folder, table or stored unit whose content cannot be used."""

    exit_code = 2


class Faults:
    """Errors of ours from several checks, collected so that a user is told of all of them at once."""

    def __init__(self) -> None:
        self.found: list[BDMergeError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep an error of the block instead of raising it."""
        try:
            yield
        except BDMergeError as error:
            self.found.append(error)

    def raise_any(self) -> None:
        """Raise what was found: one error as it is, several as one `ConfigError`."""
        flat = [part for error in self.found for part in getattr(error, "parts", (error,))]
        different = list({str(error): error for error in flat}.values())
        if len(different) == 1:
            raise different[0]
        if different:
            raise SeveralFaults(different)


class StoreLocked(BDMergeError):
    """Another run holds the store."""

    exit_code = 2


class UnitsFailed(BDMergeError):
    """One or more units of a stage failed; their siblings are committed and will be reused."""

    exit_code = 1
