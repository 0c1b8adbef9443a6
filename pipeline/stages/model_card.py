"""The model card: what an artefact is, and the lines that run it without the pipeline.

The artefact is whole: model configuration, preprocessing and class heads lie beside the weights.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.stage import Unit

PRETRAINED = "pretrained.safetensors"

OPEN = """\
import json
from pathlib import Path
import open_clip, torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file

here = Path(".")  # the folder of this card
paths = ...  # your images
task = ...  # one of {tasks}
backbone = json.loads((here / "backbone.json").read_text())
classes = json.loads((here / "classes.json").read_text())[task]
transform = image_transform_v2(PreprocessCfg(**backbone["preprocess"]), is_train=False)
images = torch.stack([transform(Image.open(path)) for path in paths])
{build}
"""

STATIC = """\
visual.load_state_dict(load_file(here / "visual.safetensors"))
with torch.inference_mode():
    features = torch.nn.functional.normalize(visual(images), dim=-1)
"""

SURGERY = """\
from bd_core.methods.surgery import Surgery

recipe, modules = json.loads((here / "recipe.json").read_text()), load_file(here / "surgery.safetensors")
surgery = Surgery(recipe["tasks"], backbone["embed_dim"], rank=modules["down"].shape[1])
surgery.load_state_dict(modules)
visual.load_state_dict(load_file(here / "visual.safetensors"))
with torch.inference_mode():
    features = torch.nn.functional.normalize(surgery(visual(images), task), dim=-1)
"""

ROUTED = """\
from bd_core import MergedModel, Router
{vectors}
form = recipe["router"]
router = Router(
    form["width"], len(form["experts"]), form["n_groups"], form["hidden"], form["kind"], form["null_expert"],
    output=form.get("output", "softmax"),
)
router.load_state_dict(load_file(here / "router.safetensors"))
visual.load_state_dict(load_file(here / "{pretrained}"))
with torch.inference_mode():
    # The router reads the mean of the pretrained tower's last tokens, CLS included.
    seen = visual.forward_intermediates(images, indices=1, output_fmt="NLC", output_extra_tokens=True)
    tokens = torch.cat([seen["image_intermediates_prefix"][-1], seen["image_intermediates"][-1]], dim=1).mean(dim=1)
    weights = router(tokens)  # [images, layer groups, experts]
    merged = MergedModel(visual, base, vectors, groups=recipe["group_of"])
    features = torch.nn.functional.normalize(merged(images, weights=weights), dim=-1)
"""

WHOLE_VECTORS = """\
from bd_core.task_vectors import TaskVectors

base, recipe = load_file(here / "base.safetensors"), json.loads((here / "recipe.json").read_text())
stored = load_file(here / "task_vectors.safetensors")
vectors = TaskVectors(stored, {name: value for name, value in base.items() if name not in stored})"""

CUT_VECTORS = """\
from bd_core.compression import CompressedVectors

base, recipe = load_file(here / "base.safetensors"), json.loads((here / "recipe.json").read_text())
integers = {name: value for name, value in base.items() if not value.is_floating_point()}
stored, kept = load_file(here / "task_vectors.safetensors"), recipe["vectors"]
shapes = {name: tuple(shape) for name, shape in kept["shapes"].items()}
factors = {name: (stored["left/" + name], stored["right/" + name]) for name in shapes if name not in stored}
whole = {name: stored[name] for name in shapes if name in stored}
vectors = CompressedVectors(factors, whole, integers, shapes, kept["relative_error"])"""

CODE = {"static": STATIC, "surgery": SURGERY}
KINDS = {
    "static": "one merged image tower",
    "surgery": "one merged image tower whose features are corrected task by task",
    "routed": "merged for every sample by a router",
}

PREDICT = """\
heads = load_file(here / "class_heads.safetensors")[task]
probabilities = (backbone["logit_scale"] * features @ heads.T).softmax(dim=-1)
predictions = [classes[index] for index in probabilities.argmax(dim=-1)]
"""


def write_model_card(directory: Path, unit: Unit) -> None:
    """Write `MODEL_CARD.md` and what its code reads: `backbone.json`, `classes.json`, `class_heads.safetensors`."""
    base = unit.one("base")
    model = json.loads(base.file("backbone.json").read_text(encoding="utf-8"))["model"]
    kept = {
        "heads.safetensors": "class_heads.safetensors",
        "classes.json": "classes.json",
        "backbone.json": "backbone.json",
    }
    if model.endswith(".json"):
        kept[model] = model
    for source, target in kept.items():
        shutil.copyfile(base.file(source), directory / target)
    tasks = list(json.loads(base.file("classes.json").read_text(encoding="utf-8")))
    recipe = json.loads((directory / "recipe.json").read_text(encoding="utf-8"))
    kept = recipe.get("vectors", {})
    vectors = CUT_VECTORS if kept.get("kind") == "low_rank" else WHOLE_VECTORS
    # Where the vectors are added to theta_0 itself, as in BD-Merging, it is not kept twice.
    pretrained = PRETRAINED if (directory / PRETRAINED).exists() else "base.safetensors"
    code = (
        OPEN.format(tasks=", ".join(tasks), build=_build(model))
        + _features(recipe["kind"], pretrained, vectors)
        + PREDICT
    )
    parents = [artefact for artefact in unit.inputs if artefact.stage in ("base", "experts")]
    made_from = "\n".join(f"- `{parent.stage}/{parent.unit}` {parent.digest[:12]}" for parent in parents)
    kind = KINDS[recipe["kind"]]
    if kept:
        kind += f"; task vectors {_stored(kept)}"
    whole = recipe["kind"] == "static"
    packages = "torch, open_clip and safetensors" if whole else "torch, open_clip, safetensors and bd_core"
    text = (
        f"# {unit.id}\n\nMethod `{unit.settings['method']}`, {kind}. `recipe.json` holds method, parameters and "
        f"layer groups; `class_heads.safetensors` the zero-shot heads of every task.\n\nMade from:\n\n{made_from}\n\n"
        f"To run it with {packages} alone:\n\n```python\n{code}```\n"
    )
    (directory / "MODEL_CARD.md").write_text(text, encoding="utf-8")


def _features(kind: str, pretrained: str, vectors: str) -> str:
    """The lines from images to features."""
    return ROUTED.format(pretrained=pretrained, vectors=vectors) if kind == "routed" else CODE[kind]


def _stored(kept: Mapping[str, Any]) -> str:
    """How the vectors are kept, and at what price."""
    form = "cut by SVD" if kept["kind"] == "low_rank" else "whole"
    return (
        f"{form} in {kept['dtype']}, {kept['bytes_per_expert'] / 2**20:.2f} MiB an expert, relative error "
        f"{kept['relative_error_mean']:.2g} on average and {kept['relative_error_max']:.2g} at most"
    )


def _build(model: str) -> str:
    """The lines that build the image tower, its weights still random."""
    if not model.endswith(".json"):
        return f"visual = open_clip.create_model({model!r}).visual.eval()"
    return (
        f"open_clip.add_model_config(here / {model!r})\n"
        f"visual = open_clip.create_model({Path(model).stem!r}).visual.eval()"
    )
