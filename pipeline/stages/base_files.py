"""The files of a base unit: model, what it is, zero-shot heads, class names."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from pipeline.backbones.open_clip import Backbone
from pipeline.formats.checkpoints import write_safetensors


def write_base(
    directory: Path,
    backbone: Backbone,
    heads: Mapping[str, Tensor],
    classes: Mapping[str, Sequence[str]],
    model_config: str | Path,
) -> None:
    """Write `model.safetensors`, `backbone.json`, `heads.safetensors` [C_k, D] a task, and `classes.json`.

    A model configuration that is a file is copied beside the weights, so that the unit needs nothing else.
    """
    model = str(model_config)
    if model.endswith(".json"):
        model = Path(model).name
        shutil.copyfile(model_config, directory / model)
    write_safetensors(directory / "model.safetensors", backbone.model.state_dict())
    write_safetensors(directory / "heads.safetensors", heads)
    described = {
        "model": model,
        "preprocess": dict(backbone.preprocess),
        "input_size": backbone.input_size,
        "embed_dim": backbone.embed_dim,
        "token_width": backbone.width,
        "logit_scale": backbone.logit_scale,
    }
    _write_json(directory / "backbone.json", described)
    # The order of tasks is the order of the experts everywhere, so these keys are not sorted.
    (directory / "classes.json").write_text(
        json.dumps({task: list(names) for task, names in classes.items()}, indent=1) + "\n", encoding="utf-8"
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
