"""The two errors a user can cause, and the one that reports failed units. Messages hold value, place and next step."""


class BDMergeError(Exception):
    """Any error of ours that the command line prints without a traceback."""

    exit_code = 1


class ConfigError(BDMergeError):
    """The user's mistake: a configuration, path or option that cannot work as given."""

    exit_code = 2


class DataError(BDMergeError):
    """Bad data: a checkpoint, image folder, table or stored unit whose content cannot be used."""

    exit_code = 2


class StoreLocked(BDMergeError):
    """Another run holds the store."""

    exit_code = 2


class UnitsFailed(BDMergeError):
    """One or more units of a stage failed; their siblings are committed and will be reused."""

    exit_code = 1
