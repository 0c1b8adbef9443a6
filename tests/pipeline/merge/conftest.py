"""Checkpoints to merge, and what must not be left of a merge."""

from collections.abc import Callable
from pathlib import Path

import pytest
from merge_models import Models


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """A base and three experts as safetensors files."""
    return Models(tmp_path)


@pytest.fixture
def nothing_left(tmp_path: Path) -> Callable[[], None]:
    """Asserts that no hidden file of a merge is left in the test's folder."""

    def check() -> None:
        assert [path.name for path in tmp_path.rglob(".*")] == []

    return check
