"""A user's own folders and checkpoints, by configuration alone: every accepted form, and the numbers a user would get.

One run of four tasks through the command line: a folder, a Parquet file, a folder with the same class names under
other spellings, and a flat folder without labels. Its predictions are compared with open_clip on the same files.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cards import run_card
from PIL import Image
from safetensors.torch import load_file, save_file
from terminal import bd_merge
from tiny import Tiny, make_tiny
from torch import Tensor

import pipeline.backbones.torchvision_ops  # noqa: F401  must come before open_clip
from pipeline.record import read_record, run_ids
from pipeline.store import Artefact, Store

CLASSES = {
    "low": ["one", "three", "two", "zero"],
    "high": ["five", "four", "three", "two"],
    "table": ["one", "three", "two", "zero"],
    "flat": ["Two", "three_", "nine"],
}


def hugging_face_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of the pipeline's map, written from transformers' modelling code."""
    renamed = {
        "logit_scale": "logit_scale",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    }
    inside = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    inside |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        tower, _, rest = name.rpartition("transformer.resblocks.")
        if name in renamed:
            found[renamed[name]] = value
        elif name in ("visual.proj", "text_projection"):
            found["visual_projection.weight" if name == "visual.proj" else "text_projection.weight"] = value.T
        else:
            number, _, layer = rest.partition(".")
            prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}."
            if layer.startswith("attn.in_proj_"):
                for which, part in zip("qkv", value.chunk(3), strict=True):
                    found[f"{prefix}self_attn.{which}_proj.{layer.removeprefix('attn.in_proj_')}"] = part
            else:
                module, _, kind = layer.rpartition(".")
                found[f"{prefix}{inside[module]}.{kind}"] = value
    return {name: value.contiguous().clone() for name, value in found.items()}


def save_hugging_face(folder: Path, state: dict[str, Tensor], activation: str = "gelu") -> None:
    folder.mkdir()
    save_file(hugging_face_names(state), folder / "model.safetensors")
    config = {"model_type": "clip", "vision_config": {"hidden_act": activation}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@dataclass(frozen=True)
class Own:
    """The project, its finished run, and the expert states that were saved in one form or another."""

    tiny: Tiny
    config: Path
    base: dict[str, Tensor]
    experts: dict[str, dict[str, Tensor]]

    def artefacts(self) -> dict[str, list[Artefact]]:
        store = Store(self.tiny.root / "store")
        return read_record(store, run_ids(store)[-1]).artefacts(store)

    def artefact(self, stage: str, unit: str) -> Artefact:
        return next(found for found in self.artefacts()[stage] if found.unit == unit)

    def predictions(self, model: str, task: str) -> dict[str, dict[str, Any]]:
        """{source: row} of the clean test images."""
        source = {
            (row["task"], row["sample_id"]): row["source"]
            for shard in self.artefacts()["shard"]
            for row in pq.read_table(shard.file("samples.parquet")).to_pylist()
        }
        rows = pq.read_table(self.artefact("evaluate", model).file("predictions.parquet")).to_pylist()
        chosen = [row for row in rows if row["task"] == task and row["level"] == "clean"]
        return {source[task, row["sample_id"]]: row for row in chosen}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Own:
    tiny = make_tiny(tmp_path_factory.mktemp("own") / "project")
    images, models = tiny.root / "images", tiny.root / "models"
    base = load_file(models / "base.safetensors")
    # Far enough apart that experts and base disagree, so that no test passes on a constant answer.
    experts = {}
    for seed, task in enumerate(CLASSES):
        draw = torch.Generator().manual_seed(100 + seed)
        experts[task] = {
            name: value + 0.1 * torch.randn(value.shape, generator=draw) if name.startswith("visual.") else value
            for name, value in base.items()
        }
    visual = {task: {n: v for n, v in state.items() if n.startswith("visual.")} for task, state in experts.items()}
    save_file(experts["low"], models / "low.safetensors")  # the whole model
    bare = {name.removeprefix("visual."): value for name, value in visual["high"].items()}
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": v for n, v in bare.items()}}, models / "high.pt")
    save_hugging_face(models / "table", experts["table"])
    save_file(visual["flat"], models / "flat.safetensors")  # the image tower alone, with its prefix

    rows = []
    for split in ("train", "test"):
        for path in sorted((images / "low" / split).rglob("*.png")):
            rows.append({"image": path.read_bytes(), "label_name": path.parent.name, "split": split})
    pq.write_table(pa.Table.from_pylist(rows), tiny.root / "table.parquet")
    for number, path in enumerate(sorted((images / "high").rglob("*.png"))):
        (images / "flat").mkdir(exist_ok=True)
        shutil.copy(path, images / "flat" / f"{number:03d}.png")

    folder = {"kind": "folder", "path": str(images / "flat"), "class_names": CLASSES["flat"], "test_fraction": 0.3}
    tasks = [
        *tiny.config["tasks"],
        {"name": "table", "source": {"kind": "parquet", "path": str(tiny.root / "table.parquet")}},
        {"name": "flat", "source": folder},
    ]
    paths = {task: models / name for task, name in zip(CLASSES, _files(), strict=True)}
    given = tiny.config["models"] | {"experts": {task: str(path) for task, path in paths.items()}}
    methods = {"methods": {"task_arithmetic": {"scale": 0.3}, "twin_merging": {}}}
    levels = {"corruptions": ["brightness"], "levels": {"L1": 1}}
    config = tiny.write("own.yaml", tasks=tasks, models=given, baselines=methods, corrupt=levels)
    ended = bd_merge("run", config)
    assert ended.exit_code == 0, ended.output
    return Own(tiny, config, base, experts)


def _files() -> tuple[str, ...]:
    return "low.safetensors", "high.pt", "table", "flat.safetensors"


@dataclass(frozen=True)
class Direct:
    """open_clip itself: the model of the JSON file, its own transform and tokenizer."""

    model: Any
    transform: Callable[[Image.Image], Tensor]
    tokenizer: Any

    @classmethod
    def of(cls, own: Own, state: dict[str, Tensor]) -> "Direct":
        import open_clip

        open_clip.add_model_config(own.tiny.root / "models" / "tiny_clip.json")
        model, _, transform = open_clip.create_model_and_transforms("tiny_clip")
        model.load_state_dict(state)
        return cls(model.eval(), transform, open_clip.get_tokenizer("tiny_clip"))

    @torch.no_grad()
    def probabilities(self, images: list[Image.Image], heads: Tensor) -> Tensor:
        features = self.model.encode_image(torch.stack([self.transform(image) for image in images]), normalize=True)
        return (self.model.logit_scale.exp() * features @ heads.T).softmax(-1)

    @torch.no_grad()
    def heads(self, classes: list[str], template: str) -> Tensor:
        return self.model.encode_text(self.tokenizer([template.format(name) for name in classes]), normalize=True)


def test_every_form_reaches_the_store_as_the_same_weights(own: Own) -> None:
    assert_equal(load_file(own.artefact("base", "base").file("model.safetensors")), own.base)
    for task, state in own.experts.items():
        kept = load_file(own.artefact("experts", task).file("visual.safetensors"))
        assert_equal(kept, {n.removeprefix("visual."): v for n, v in state.items() if n.startswith("visual.")})


@pytest.mark.parametrize("model", ["pretrained", "experts"])
@pytest.mark.parametrize("task", ["low", "high"])
def test_predictions_are_those_of_open_clip(own: Own, model: str, task: str) -> None:
    found = own.predictions(model, task)
    direct = Direct.of(own, own.base if model == "pretrained" else own.experts[task])
    # The experts were tuned against the base's text tower.
    heads = Direct.of(own, own.base).heads(CLASSES[task], "a digit {}.")
    images = [Image.open(own.tiny.root / "images" / task / source) for source in found]
    assert len(images) == 16
    expected = direct.probabilities(images, heads)
    assert [row["prediction"] for row in found.values()] == expected.argmax(-1).tolist()
    torch.testing.assert_close(
        torch.tensor([row["confidence"] for row in found.values()]), expected.amax(-1), rtol=1e-4, atol=1e-5
    )
    labels = [CLASSES[task].index(Path(source).parent.name) for source in found]
    assert [row["label"] for row in found.values()] == labels
    correct = (expected.argmax(-1) == torch.tensor(labels)).double().mean().item()
    metrics = json.loads(own.artefact("evaluate", model).file("metrics.json").read_text(encoding="utf-8"))
    assert metrics["protocols"]["task_known"]["clean"]["tasks"][task]["accuracy"] == pytest.approx(correct)


def test_the_experts_do_not_all_answer_alike(own: Own) -> None:
    rows = {model: own.predictions(model, "low") for model in ("pretrained", "experts")}
    confidences = {model: [row["confidence"] for row in found.values()] for model, found in rows.items()}
    assert confidences["pretrained"] != pytest.approx(confidences["experts"], abs=1e-3)


def test_a_table_holds_the_same_images_as_its_folder(own: Own) -> None:
    table, folder = own.predictions("pretrained", "table"), own.predictions("pretrained", "low")
    by_image = {row["sample_id"]: row["label"] for row in folder.values()}
    assert {row["sample_id"]: row["label"] for row in table.values()} == by_image
    assert all(source.startswith("table.parquet#") for source in table)


def test_images_without_labels_are_predicted_and_not_judged(own: Own) -> None:
    rows = own.predictions("bd_layer", "flat")
    assert rows and all(row["label"] == -1 and row["weights"] for row in rows.values())
    unit = own.artefact("evaluate", "bd_layer")
    metrics = json.loads(unit.file("metrics.json").read_text(encoding="utf-8"))
    clean = metrics["protocols"]["task_known"]["clean"]
    assert clean["tasks"]["flat"] == {"n": 0, "accuracy": None, "ece": None, "aurc": None}
    measured = [clean["tasks"][task]["accuracy"] for task in ("low", "high", "table")]
    assert clean["mean"]["accuracy"] == pytest.approx(sum(measured) / 3)
    assert unit.report["notes"]["unlabelled"] == {"low": 0, "high": 0, "table": 0, "flat": len(rows)}


def test_equal_class_names_are_one_class_however_they_are_spelt(own: Own) -> None:
    space = json.loads(own.artefact("fit_head", "head").file("config.json").read_text(encoding="utf-8"))
    assert sorted(space["classes"]) == ["five", "four", "nine", "one", "three", "two", "zero"]
    two = {
        task: space["maps"][task][place]
        for task, names in CLASSES.items()
        for place, name in enumerate(names)
        if name in ("two", "Two")
    }
    assert len(set(two.values())) == 1 and set(two) == set(CLASSES)
    assert space["maps"]["flat"][1] == space["maps"]["low"][1]  # `three_` and `three`


@pytest.mark.parametrize("model", ["task_arithmetic", "twin_merging", "bd_task", "bd_layer"])
@pytest.mark.parametrize("task", ["high", "flat"])
def test_the_model_card_alone_runs_the_artefact(own: Own, model: str, task: str, tmp_path: Path) -> None:
    stage = "export" if model.startswith("bd_") else "baselines"
    found = own.predictions(model, task)
    images = [own.tiny.root / "images" / task / source for source in found]
    names = run_card(own.artefact(stage, model).path, images, task, tmp_path)
    assert names["predictions"] == [CLASSES[task][row["prediction"]] for row in found.values()]
    confidence = torch.tensor([row["confidence"] for row in found.values()])
    torch.testing.assert_close(names["probabilities"].amax(-1), confidence, rtol=1e-4, atol=1e-5)
    if "weights" in names:
        weights = torch.tensor([row["weights"] for row in found.values()])
        torch.testing.assert_close(names["weights"].flatten(1), weights, rtol=1e-4, atol=1e-5)


def test_the_same_base_in_another_form_costs_one_import(own: Own) -> None:
    models = own.tiny.root / "models"
    torch.save(own.base, models / "base.pt")
    save_hugging_face(models / "base_hf", own.base)
    before = own.artefacts()
    for form in ("base.pt", "base_hf"):
        ended = bd_merge("run", own.config, f"models.base={models / form}")
        assert ended.exit_code == 0, ended.output
        after = own.artefacts()
        assert after["base"][0].key != before["base"][0].key
        assert after["base"][0].digest == before["base"][0].digest
        for stage in before.keys() - {"base"}:
            assert [unit.key for unit in after[stage]] == [unit.key for unit in before[stage]], stage


def test_half_precision_checkpoints_are_imported_in_the_models_precision(own: Own, tmp_path: Path) -> None:
    models = tmp_path / "half"
    models.mkdir()
    save_file({name: value.half() for name, value in own.base.items()}, models / "base.safetensors")
    for task in ("low", "high"):
        save_file({name: value.half() for name, value in own.experts[task].items()}, models / f"{task}.safetensors")
    config = own.tiny.write("half.yaml")
    given = [f"models.base={models}/base.safetensors", f"models.experts.low={models}/low.safetensors"]
    # A radius that nothing is within ends the run where import and embedding are done.
    ended = bd_merge(
        "run",
        config,
        *given,
        f"models.experts.high={models}/high.safetensors",
        f"store={tmp_path}/s",
        "index.min_cosine=1.0",
    )
    assert ended.exit_code == 2 and "index.min_cosine" in ended.output, ended.output
    (expert,) = (tmp_path / "s" / "experts").glob("low-*")
    for name, value in load_file(expert / "visual.safetensors").items():
        assert torch.equal(value, own.experts["low"][f"visual.{name}"].half().float()), name


def test_an_activation_that_the_folder_declares_must_be_the_models(own: Own) -> None:
    save_hugging_face(own.tiny.root / "models" / "quick", own.experts["low"], activation="quick_gelu")
    ended = bd_merge("plan", own.config, f"models.experts.low={own.tiny.root}/models/quick")
    assert ended.is_clear_refusal and "trained with the activation 'quick_gelu'" in ended.output


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
