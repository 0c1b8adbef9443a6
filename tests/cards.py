"""A model card's own lines, run where nothing but the artefact lies."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


def run_card(artefact: Path, images: Sequence[Path], task: str, elsewhere: Path) -> dict[str, Any]:
    """The names that the card's lines define for these images; the artefact is copied below `elsewhere` before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(shutil.copytree(artefact, elsewhere / "model"))
        card = Path("MODEL_CARD.md").read_text(encoding="utf-8")
        code = card.split("```python\n")[1].split("```")[0]
        code = code.replace("paths = ...", f"paths = {[str(image) for image in images]!r}")
        code = code.replace("task = ...", f"task = {task!r}")
        assert "pipeline" not in code and "..." not in code
        names: dict[str, Any] = {}
        exec(compile(code, "MODEL_CARD.md", "exec"), names)
    return names
