"""A project that has run, and copies of projects that keep their keys."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tiny import Tiny

if TYPE_CHECKING:
    from pipeline.store import Store


@dataclass(frozen=True)
class Finished:
    """A project, its configuration file, the store in which it has run, and the id of that run."""

    tiny: Tiny
    config: Path
    path: Path
    run_id: str

    @property
    def store(self) -> "Store":
        from pipeline.store import Store

        return Store(self.path)


def copied(tiny: Tiny, root: Path) -> Tiny:
    """The same project below `root`: equal bytes and times of change, so equal keys; other paths, so another run."""
    shutil.copytree(tiny.root, root)
    return Tiny(root, json.loads(json.dumps(tiny.config).replace(str(tiny.root), str(root))))
