"""The model card: what an artefact is, and the lines that run it without the pipeline."""

from pathlib import Path

from pipeline.stage import Unit

STATIC = """\
import torch
from safetensors.torch import load_file

visual = ...  # the image tower of the same open_clip model
visual.load_state_dict(load_file("visual.safetensors"))
features = torch.nn.functional.normalize(visual(images), dim=-1)
"""

ROUTED = """\
import json
import torch
from safetensors.torch import load_file
from bd_core import MergedModel, Router
from bd_core.task_vectors import TaskVectors

recipe = json.load(open("recipe.json"))
visual = ...  # the image tower of the same open_clip model
vectors = TaskVectors(load_file("task_vectors.safetensors"))
merged = MergedModel(visual, load_file("base.safetensors"), vectors, groups=recipe["group_of"])
form = recipe["router"]
router = Router(
    form["width"], len(form["experts"]), form["n_groups"], form["hidden"], form["kind"], form["null_expert"]
)
router.load_state_dict(load_file("router.safetensors"))
weights = router(tokens)  # mean of the pretrained tower's last-block tokens, [B, width]
features = torch.nn.functional.normalize(merged(images, weights=weights), dim=-1)
"""


def write_model_card(directory: Path, unit: Unit) -> None:
    """Write `MODEL_CARD.md` beside the weights."""
    routed = (directory / "task_vectors.safetensors").exists()
    parents = [artefact for artefact in unit.inputs if artefact.stage in ("base", "experts")]
    made_from = "\n".join(f"- `{parent.stage}/{parent.unit}` {parent.digest[:12]}" for parent in parents)
    kind = "merged for every sample by a router" if routed else "one merged image tower"
    text = (
        f"# {unit.id}\n\nMethod `{unit.settings['method']}`, {kind}. `recipe.json` holds method, parameters and "
        f"layer groups; class heads are those of the base.\n\nMade from:\n\n{made_from}\n\n"
        "To run it with `bd_core` alone:\n\n"
        f"```python\n{ROUTED if routed else STATIC}```\n"
    )
    (directory / "MODEL_CARD.md").write_text(text, encoding="utf-8")
