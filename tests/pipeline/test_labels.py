"""No fitting stage reads a label: shuffled labels give byte-equal head, routers, pairs and merges.

Methods that say they need labelled validation images are the exception, and their keys count the labels.
"""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tiny import Tiny

from pipeline.run import run
from pipeline.store import Store
from pipeline.workflow import Workflow

FITTED = (
    "fit_head",
    "radius",
    "edges",
    "neighbours",
    "score",
    "threshold",
    "pairs",
    "fit_router",
    "activations",
    "baselines",
    "surgery",
)
LABELLED = "baselines/bmm/"


def fitted(tiny: Tiny, name: str, turn: int) -> dict[str, bytes]:
    """{path: bytes} of all files of the fitting stages, the labels of each task turned by `turn` images."""
    tasks = []
    for task in tiny.config["tasks"]:
        table = tiny.root / f"{name}-{task['name']}.parquet"
        pq.write_table(table_of(Path(task["source"]["path"]), turn), table)
        tasks.append({**task, "source": {"kind": "parquet", "path": str(table)}})
    workflow = Workflow.load(tiny.write(f"{name}.yaml", tasks=tasks, store=str(tiny.root / name)))
    last = [stage.name for stage in workflow.stages].index("fit_router")
    workflow.stages = workflow.stages[: last + 1]
    run(workflow, f"bd-merge run {name}.yaml")
    return {
        f"{manifest.stage}/{manifest.unit}/{file}": (path / file).read_bytes()
        for path, manifest in Store(tiny.root / name).units()
        if manifest.stage in FITTED
        for file in manifest.files
    }


def table_of(folder: Path, turn: int) -> pa.Table:
    """The folder's images in order; within a split, labels are those of the images `turn` places on."""
    columns: dict[str, list[object]] = {"image": [], "label_name": [], "split": []}
    for split in ("train", "test"):
        images = sorted((folder / split).rglob("*.png"))
        labels = [image.parent.name for image in images]
        columns["image"] += [image.read_bytes() for image in images]
        columns["label_name"] += [*labels[turn:], *labels[:turn]]
        columns["split"] += [split] * len(images)
    return pa.table(columns)


def test_shuffled_labels_give_byte_equal_head_routers_pairs_and_merges(tiny_project: Tiny) -> None:
    true, shuffled = fitted(tiny_project, "true", 0), fitted(tiny_project, "shuffled", 17)
    labels = [pq.read_table(tiny_project.root / f"{name}-low.parquet")["label_name"] for name in ("true", "shuffled")]
    assert labels[0] != labels[1]
    stored = [
        pq.read_table(io.BytesIO(path.joinpath("samples.parquet").read_bytes()))["label"].to_pylist()
        for name in ("true", "shuffled")
        for path, m in Store(tiny_project.root / name).units()
        if m.stage == "shard" and m.unit == "low-train-00000"
    ]
    assert stored[0] != stored[1], "the shards must know the shuffled labels, or the test shows nothing"
    assert {name.split("/")[0] for name in true} == set(FITTED)
    told = {name for name in (*true, *shuffled) if name.startswith(LABELLED)}
    assert [name for name in told if true.pop(name, None) != shuffled.pop(name, None)]
    assert {"fit_router/task/model.safetensors", "fit_router/layer/model.safetensors"} <= set(true)
    assert sorted(true) == sorted(shuffled)
    assert [name for name in true if true[name] != shuffled[name]] == []
