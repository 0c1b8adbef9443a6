"""Bad input: a clear error with value, place and next step, exit code 2, before any long work; or a counted reject."""

import io
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from terminal import bd_merge
from tiny import Tiny
from torch import Tensor

from pipeline.record import read_record, run_ids
from pipeline.store import Store

ANY = "visual.class_embedding"


@pytest.fixture
def tiny(tiny_project: Tiny) -> Tiny:
    """A project of the test's own, which it may spoil."""
    return tiny_project


def refusal(tiny: Tiny, *overrides: str, **changes: Any) -> str:
    """What `run` says; it must refuse clearly and leave no trace, and `doctor` must find the same."""
    config = tiny.write(**changes)
    ended = bd_merge("run", config, *overrides)
    assert ended.is_clear_refusal, ended.output
    assert not (tiny.root / "store").exists(), "something was written"
    examined = bd_merge("doctor", config, *overrides)
    assert examined.exit_code == 2 and "FAIL" in examined.output, examined.output
    return ended.output


def spoilt(tiny: Tiny, change: Callable[[dict[str, Tensor]], Any], name: str = "low") -> Path:
    """A checkpoint of the project, changed and saved again."""
    path = tiny.root / "models" / f"{name}.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    return path


# Checkpoints


def test_the_difference_in_keys_and_shapes_and_dtypes_is_printed(tiny: Tiny) -> None:
    def change(state: dict[str, Tensor]) -> None:
        state["visual.extra.weight"] = torch.zeros(3)
        del state[ANY]
        state["visual.ln_pre.weight"] = torch.zeros(5)
        state["visual.ln_pre.bias"] = state["visual.ln_pre.bias"].half()

    spoilt(tiny, change)
    said = refusal(tiny)
    assert "expert low: 4 difference(s)" in said
    assert "- class_embedding [32] float32: only in the base" in said
    assert "+ extra.weight [3] float32: only in the expert" in said
    assert "~ ln_pre.weight: [32] float32 in the base, [5] float32 in the expert" in said
    assert "~ ln_pre.bias: [32] float32 in the base, [32] float16 in the expert" in said


class Payload:
    """What an attacker puts into a checkpoint."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.proof,))


@pytest.mark.parametrize("role", ["base", "low"])
def test_a_pickle_of_arbitrary_objects_is_refused_and_never_executed(tiny: Tiny, role: str) -> None:
    proof = tiny.root / "executed"
    evil = tiny.root / "models" / "evil.pt"
    torch.save({**load_file(tiny.root / "models" / "base.safetensors"), "x": Payload(proof)}, evil)
    key = "models.base" if role == "base" else "models.experts.low"
    said = refusal(tiny, f"{key}={evil}")
    assert str(evil) in said and "refused" in said and "Nothing was executed" in said
    assert not proof.exists()


@pytest.mark.parametrize("kept", [5, 0.5])
def test_a_truncated_checkpoint(tiny: Tiny, kept: float) -> None:
    path = tiny.root / "models" / "low.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept if kept > 1 else kept * len(whole))])
    said = refusal(tiny)
    assert f"{path}: not a " in said and "safetensors file" in said and "copy it again" in said


def test_checkpoints_that_are_not_there_are_all_named(tiny: Tiny) -> None:
    said = refusal(tiny, "models.base=/gone/a", "models.experts.low=/gone/b", "models.experts.high=/gone/c")
    assert all(f"checkpoint /gone/{name} does not exist; correct the path" in said for name in "abc")


def test_a_model_that_the_base_was_not_made_with(tiny: Tiny) -> None:
    said = refusal(tiny, "models.model=ViT-B-32")
    assert "base.safetensors: the checkpoint does not fit model 'ViT-B-32'" in said
    assert "choose the model it was made with" in said


def test_an_image_tower_alone_is_no_base(tiny: Tiny) -> None:
    said = refusal(tiny, f"models.base={tiny.root}/models/low.safetensors")
    assert "the base must be the whole model, its text tower makes the class heads" in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "lacks embed_dim"),
        ('{"embed_dim": "16", "vision_cfg": {}, "text_cfg": {}}', "embed_dim is '16', it must be of type int"),
        ('{"embed_dim": 16, "vision_cfg": [], "text_cfg": {}}', "vision_cfg is [], it must be of type dict"),
        ('{"embed_dim": 16, "vision_cfg": {"widht": 4}, "text_cfg": {}}', "cannot be built from its configuration"),
        ('{"embed_dim": 16, "vision_cfg": {"layers": [1, 1, 1, 1]}, "text_cfg": {}}', "choose a ViT"),
        ('{"embed_dim": 16, "vision_cfg": {"image_size": 16}, "text_cfg": {}}', "need images of 32 pixels or more"),
    ],
)
def test_an_unusable_model_configuration(tiny: Tiny, content: str, says: str) -> None:
    (tiny.root / "models" / "tiny_clip.json").write_text(content, encoding="utf-8")
    assert says in refusal(tiny)


def test_an_unknown_model_name(tiny: Tiny) -> None:
    assert "did you mean ViT-B-32" in refusal(tiny, "models.model=ViT-B-33")


@pytest.mark.parametrize(("role", "value"), [("base", float("nan")), ("low", float("inf"))])
def test_nan_in_a_checkpoint_is_named_when_it_is_imported(tiny: Tiny, role: str, value: float) -> None:
    spoilt(tiny, lambda state: state[ANY].fill_(value), role)
    ended = bd_merge("run", tiny.write())
    assert ended.exit_code == 2 and "Traceback" not in ended.output
    assert "class_embedding hold NaN or infinity; take an earlier checkpoint" in ended.output
    assert not (tiny.root / "store" / "embed").exists()


# Data


def test_missing_and_empty_folders_of_several_tasks_are_told_at_once(tiny: Tiny) -> None:
    (tiny.root / "empty").mkdir()
    said = refusal(tiny, f"tasks.0.source.path={tiny.root}/gone", f"tasks.1.source.path={tiny.root}/empty")
    assert f"task low: folder {tiny.root}/gone does not exist; correct the path" in said
    assert f"task high: folder {tiny.root}/empty has no class folders" in said


def test_a_folder_that_is_a_file(tiny: Tiny) -> None:
    (tiny.root / "file").write_text("x", encoding="utf-8")
    assert "is not a folder; correct the path" in refusal(tiny, f"tasks.0.source.path={tiny.root}/file")


def test_a_flat_folder_without_class_names(tiny: Tiny) -> None:
    flat = tiny.root / "images" / "low" / "train" / "two"
    assert "list class_names in the configuration" in refusal(tiny, f"tasks.0.source.path={flat}")


@pytest.mark.parametrize(
    ("names", "says"), [("[two, Two]", "two classes called 'two'"), ("[two, '']", "every class a name")]
)
def test_class_names_that_are_no_names(tiny: Tiny, names: str, says: str) -> None:
    flat = tiny.root / "images" / "low" / "train" / "two"
    assert says in refusal(tiny, f"tasks.0.source.path={flat}", f"tasks.0.source.class_names={names}")


def test_labels_that_are_none_of_the_class_names(tiny: Tiny) -> None:
    pq.write_table(pa.table({"image": [b"x"] * 9, "label_name": ["two"] * 8 + ["nine"]}), tiny.root / "t.parquet")
    source = {"kind": "parquet", "path": str(tiny.root / "t.parquet"), "split_column": None, "class_names": ["two"]}
    said = refusal(tiny, tasks=[{"name": "low", "source": source}, tiny.config["tasks"][1]])
    assert "task low: labels 'nine' are none of its 1 classes; add them to class_names" in said


def test_a_task_without_test_images(tiny: Tiny) -> None:
    shutil.rmtree(tiny.root / "images" / "low" / "test")
    assert "has train/ but no test/; add it" in refusal(tiny)
    (tiny.root / "images" / "low" / "test").mkdir()
    assert "task low: no test images, and both splits are needed; add some" in refusal(tiny)


def test_a_test_split_of_rejects_alone_ends_the_run_before_anything_is_made_of_it(tiny: Tiny) -> None:
    for path in (tiny.root / "images" / "low" / "test").rglob("*.png"):
        path.write_bytes(b"no image")
    ended = bd_merge("run", tiny.write())
    assert ended.is_clear_refusal
    assert "task low: no test image could be read; 16 rejected, see " in ended.output
    assert not (tiny.root / "store" / "base").exists()


def test_training_needs_labels(tiny: Tiny) -> None:
    flat = {"kind": "folder", "path": str(tiny.root / "images" / "low" / "train" / "two"), "class_names": ["two"]}
    models = {"kind": "trained", "model": tiny.config["models"]["model"]}
    said = refusal(tiny, models=models, tasks=[{"name": "low", "source": flat}, tiny.config["tasks"][1]])
    assert "task low: no train image has a label" in said


# Options


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("corrupt.corruptions=[fogg]", "corrupt.corruptions: there is no ['fogg']; did you mean fog?"),
        ("baselines.methods.tise={}", "no merging method 'tise'; did you mean ties?"),
        ("fit_ruter.steps=3", "did you mean fit_router?"),
        ("fit_router.steps=0", "fit_router.steps: Input should be greater than or equal to 1 (value 0)"),
        ("seed", "override 'seed' is not of the form key=value"),
        ("store=/dev/null/store", "/dev/null is a file; name a directory"),
        ("resources.embed.gpus=1", "resources.embed.gpus: 1, no CUDA device is here"),
    ],
)
def test_options(tiny: Tiny, override: str, says: str) -> None:
    if "gpus" in override and torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert says in refusal(tiny, override)


def test_more_cpus_than_the_local_ray_has(tiny: Tiny) -> None:
    ray = {"kind": "ray", "cpus": 2}
    said = refusal(tiny, "fit_head.workers=3", executor=ray, resources={"fit_router": {"cpus": 3}})
    assert "resources.fit_router.cpus: 3, the local Ray has 2" in said
    assert "resources.fit_head.cpus: 1 for each of 3 workers, the local Ray has 2" in said


def test_a_store_that_cannot_be_written(tiny: Tiny) -> None:
    ended = bd_merge("run", tiny.write(), "store=/proc/store")
    assert ended.is_clear_refusal and "store /proc/store" in ended.output


def test_a_radius_under_which_no_sample_has_a_neighbour(tiny: Tiny) -> None:
    ended = bd_merge("run", tiny.write(), "index.min_cosine=1.0")
    assert ended.exit_code == 2 and "Traceback" not in ended.output
    assert "index.min_cosine 1: none of 16 sampled images has a neighbour within this radius; lower it" in ended.output
    assert "resume with:" in ended.output
    assert not (tiny.root / "store" / "neighbours").exists()


# Images that are rejects


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header claims 100,000 by 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def noise(seed: int) -> bytes:
    """A PNG that no other image of the project is equal to."""
    pixels = torch.randint(256, (40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


def test_bad_images_are_rejects_with_a_reason_counted_and_never_lost(tiny: Tiny) -> None:
    train, test = (tiny.root / "images" / "low" / split for split in ("train", "test"))
    good = (train / "two" / "000.png").read_bytes()
    (train / "two" / "a_truncated.png").write_bytes(noise(0)[:2000])
    (train / "two" / "b_text.png").write_text("no image", encoding="utf-8")
    (train / "two" / "c_empty.png").write_bytes(b"")
    (train / "two" / "d_bomb.png").write_bytes(bomb())
    (train / "two" / "000_again.png").write_bytes(good)
    (train / "zero" / "z_other_shard.png").write_bytes((train / "one" / "000.png").read_bytes())
    (train / "zero" / "z_also_test.png").write_bytes((test / "one" / "000.png").read_bytes())
    for number in (1, 2, 3):
        (test / "zero" / f"z_twice_{number}.png").write_bytes((test / "one" / f"00{number}.png").read_bytes())
    # Six images a shard: the last of train and the last of test hold nothing but an image that another shard holds.
    changes: dict[str, Any] = {"shard": {"images_per_shard": 6}, "baselines": {"methods": {}}}
    changes["corrupt"] = {"corruptions": ["brightness"], "levels": {"L1": 1}}
    ended = bd_merge("run", tiny.write(**changes), "fit_router.variants=[task]")
    assert ended.exit_code == 0, ended.output
    store = Store(tiny.root / "store")
    artefacts = read_record(store, run_ids(store)[-1]).artefacts(store)
    reasons: dict[str, Counter[str]] = {}
    for stage in ("shard", "embed", "corrupt"):
        for unit in artefacts[stage]:
            report, rows = unit.report, pq.read_table(unit.file("rejects.parquet")).to_pylist()
            assert report["rows_in"] == report["rows_out"] + report["rejected"]
            assert len(rows) == report["rejected"] == sum(report["notes"]["rejects"].values())
            assert all(row["source"] and row["reason"] for row in rows)
            if unit.report["notes"].get("level", "clean") == "clean":
                reasons.setdefault(stage, Counter()).update(
                    {Path(row["source"]).name: 1 for row in rows if "low" in unit.unit}
                )
    assert reasons["shard"] == Counter(["a_truncated.png", "b_text.png", "c_empty.png", "d_bomb.png", "000_again.png"])
    # The same image in two shards of train, and in train and test: it is kept once, and where it is judged.
    assert sum(reasons["embed"].values()) == 2 and "z_also_test.png" in reasons["embed"]
    assert sorted(reasons["corrupt"]) == [f"z_twice_{number}.png" for number in (1, 2, 3)]
    assert 0 in {unit.report["rows_out"] for unit in artefacts["embed"]}
    assert 0 in {unit.report["rows_out"] for unit in artefacts["corrupt"]}
    written = {
        row["reason"].split(":")[0].split(" of ")[0]
        for unit in artefacts["shard"]
        for row in pq.read_table(unit.file("rejects.parquet")).to_pylist()
    }
    assert written == {"does not decode", "not an image", "empty file", "oversized", "duplicate"}
    page = artefacts["report"][0].file("report.html").read_text(encoding="utf-8")
    assert all(reason in page for reason in written)
    # Every image of the folder is accounted for.
    files = sum(1 for path in (tiny.root / "images" / "low").rglob("*.png"))
    shards = [unit for unit in artefacts["shard"] if unit.report["notes"]["task"] == "low"]
    assert sum(unit.report["rows_in"] for unit in shards) == files
