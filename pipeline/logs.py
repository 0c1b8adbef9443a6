"""Log lines of one fact with its keys: `embed shard-00042 done rows=1000 rejected=2`."""

import logging
import sys

LOGGER = logging.getLogger("bd-merge")


def configure(verbose: bool = False) -> None:
    """Send our log lines to standard error, once; other libraries stay at WARNING."""
    if not LOGGER.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
        LOGGER.addHandler(handler)
        LOGGER.propagate = False
    LOGGER.setLevel(logging.DEBUG if verbose else logging.INFO)


def fact(event: str, /, level: int = logging.INFO, **keys: object) -> None:
    """Log one fact: the event in a few words, then its keys."""
    LOGGER.log(level, " ".join([event, *(f"{name}={_short(value)}" for name, value in keys.items())]))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
