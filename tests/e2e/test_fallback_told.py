"""A tower with layers that have no batched form: merged all the same, and said so, once, by every stage it slows."""

import json
import logging
from pathlib import Path

import pytest
import tiny

from pipeline import logs
from pipeline.record import read_record
from pipeline.run import run
from pipeline.store import Store
from pipeline.workflow import Workflow


class Lines(logging.Handler):
    """Collects what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(record.getMessage())


def test_a_layer_without_a_batched_form_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # open_clip's own attention multiplies by its joint weight itself.
    vision = {**tiny.CLIP["vision_cfg"], "block_type": "custom", "qk_norm": True}  # type: ignore[dict-item]
    monkeypatch.setattr(tiny, "CLIP", {**tiny.CLIP, "vision_cfg": vision})
    project = tiny.make_tiny(tmp_path / "project")
    config = project.write(corrupt={"corruptions": ["brightness"], "levels": {"L1": 1}}, baselines={"methods": {}})
    workflow = Workflow.load(config)
    workflow.stages = [stage for stage in workflow.stages if stage.name not in ("detect", "report")]
    lines = Lines()
    logs.LOGGER.addHandler(lines)
    try:
        record = run(workflow, "bd-merge run")
    finally:
        logs.LOGGER.removeHandler(lines)
    told = [line for line in lines.found if "torch.func" in line]
    stages = ("fit_router task", "fit_router layer", "evaluate bd_task", "evaluate bd_layer")
    assert sorted(line.partition(" merges")[0] for line in told) == sorted(stages)
    assert all("attn (Attention)" in line for line in told)
    store = Store(project.root / "store")
    evaluated = {unit.unit: unit for unit in read_record(store, record.run_id).artefacts(store)["evaluate"]}
    assert "attn (Attention)" in evaluated["bd_layer"].report["notes"]["fallback_reason"]
    assert "fallback_reason" not in evaluated["pretrained"].report["notes"]
    metrics = json.loads(evaluated["bd_layer"].file("metrics.json").read_text(encoding="utf-8"))
    assert metrics["mode"] == "exact"
