"""One project whose experts lie far apart, run with its task vectors in every form; read it, never change it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CLASSES, Tiny, make_tiny

if TYPE_CHECKING:
    from pipeline.store import Artefact

# Two experts of two tasks: at rank 2 the tiny tower's matrices are cut hard, which the numbers must show.
FORMS = {
    "whole": [],
    "low_rank": ["export.vectors={kind: low_rank, rank: 2, dtype: bfloat16}", "export.static=true"],
    "bfloat16": ["export.vectors={kind: dense, dtype: bfloat16}", "evaluate.grouped_distance=0.05"],
}


@dataclass(frozen=True)
class Forms:
    """The project, its configuration, and the run of every form."""

    tiny: Tiny
    config: Path
    runs: dict[str, str]

    @property
    def store(self) -> Path:
        return self.tiny.root / "store"

    def artefact(self, form: str, stage: str, unit: str) -> "Artefact":
        from pipeline.record import read_record
        from pipeline.store import Store

        units = read_record(Store(self.store), self.runs[form]).artefacts(Store(self.store))[stage]
        return next(found for found in units if found.unit == unit)

    def metrics(self, form: str, model: str) -> dict[str, Any]:
        path = self.artefact(form, "evaluate", model).file("metrics.json")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def clean(self, form: str, model: str, task: str) -> dict[Path, dict[str, Any]]:
        """{image: row of predictions.parquet} of the task's clean test images."""
        from pipeline.record import read_record
        from pipeline.store import Store

        shards = read_record(Store(self.store), self.runs[form]).artefacts(Store(self.store))["shard"]
        samples = [row for shard in shards for row in pq.read_table(shard.file("samples.parquet")).to_pylist()]
        source = {row["sample_id"]: row["source"] for row in samples if row["task"] == task}
        rows = pq.read_table(self.artefact(form, "evaluate", model).file("predictions.parquet")).to_pylist()
        chosen = [row for row in rows if (row["task"], row["level"]) == (task, "clean")]
        return {self.tiny.root / "images" / task / source[row["sample_id"]]: row for row in chosen}


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Forms:
    from pipeline.run import run
    from pipeline.workflow import Workflow

    tiny = make_tiny(tmp_path_factory.mktemp("forms") / "project")
    base = load_file(tiny.root / "models" / "base.safetensors")
    for seed, task in enumerate(CLASSES):
        draw = torch.Generator().manual_seed(100 + seed)
        tower = {name: value for name, value in base.items() if name.startswith("visual.")}
        expert = {name: value + 0.1 * torch.randn(value.shape, generator=draw) for name, value in tower.items()}
        save_file(expert, tiny.root / "models" / f"{task}.safetensors")
    config = tiny.write(
        corrupt={"corruptions": ["brightness"], "levels": {"L1": 1}}, baselines={"methods": {"twin_merging": {}}}
    )
    runs = {}
    for form, options in FORMS.items():
        workflow = Workflow.load(config, options)
        if form != "low_rank":  # one page is enough; the pictures take longer than all the rest
            workflow.stages = [stage for stage in workflow.stages if stage.name != "report"]
        runs[form] = run(workflow, "bd-merge run").run_id
    return Forms(tiny, config, runs)
