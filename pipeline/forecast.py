"""What a run will put on disk, told before anything was ever made: from the images' number and size, and the models'.

Shape letters: N train images, M test images, D feature width, W token width, S side of the model's input, K experts.
"""

from collections.abc import Mapping
from math import prod

from torch import Tensor

from pipeline.backbones.open_clip import input_size, model_header
from pipeline.data.items import Split
from pipeline.data.source import Source
from pipeline.workflow import Workflow

FLOAT_BYTES, ROW_BYTES = 4, 8


def forecast_bytes(workflow: Workflow) -> dict[str, float]:
    """{stage: bytes of all its units, at most}; a stage is left out when its size follows from the data only."""
    config = workflow.config
    sources = [task.source for task in config.tasks]
    model = model_header(config.models.model)
    full, tower = _size(model), _size({name: value for name, value in model.items() if name.startswith("visual.")})
    merged = [task.source for task in config.tasks if task.name not in config.evaluate.unseen]
    n_experts = len(merged)
    n_routed = sum(entry.per_sample and "after" not in entry.options for entry in config.baselines.entries())
    routed_size = (2 + n_experts) * tower
    known: dict[str, float | None] = {
        "shard": _total([source.size_bytes() for source in sources]),
        "base": full,
        "experts": n_experts * tower,
        "baselines": (len(config.baselines.methods) - n_routed) * tower + n_routed * routed_size,
        # Vectors that are cut or rounded take less: this is the most.
        "export": len(config.fit_router.variants) * (routed_size + config.export.static * tower),
    }
    if any(entry.uses_activations for entry in config.baselines.entries()):
        known["activations"] = n_experts * _gram_bytes(model)
    width, dim = (model[name].shape[axis] for name, axis in (("visual.class_embedding", 0), ("visual.proj", 1)))
    train = _total([_images(source, "train") for source in merged])
    test = _total([_images(source, "test") for source in sources])
    if train is not None:
        known |= {"embed": train * (dim + width) * FLOAT_BYTES}
    if test is not None:
        copies = len(config.corrupt.corruptions) if config.corrupt.every_corruption else 1
        known["corrupt"] = test * (1 + copies * len(config.corrupt.levels)) * 3 * input_size(config.models.model) ** 2
    return {stage: size for stage, size in known.items() if size is not None}


def _gram_bytes(model: Mapping[str, Tensor]) -> float:
    """Bytes of one expert's Gram matrices: [I, I] for each weight [O, I] of a linear layer in the image tower."""
    layers = (v for name, v in model.items() if name.startswith("visual.") and name.endswith("weight") and v.ndim == 2)
    return float(sum(layer.shape[1] ** 2 for layer in layers) * FLOAT_BYTES)


def _images(source: Source, split: Split) -> float | None:
    """How many images of a split there are at most; None where only reading them would tell."""
    blocks = [block for block in source.blocks(rows=2**31) if block.split == split]
    if all(block.items for block in blocks):
        return float(sum(len(block.items) for block in blocks))
    return source.max_train if split == "train" else source.max_test


def _total(sizes: list[float | None]) -> float | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _size(state: Mapping[str, Tensor]) -> float:
    return float(sum(prod(value.shape) for value in state.values()) * FLOAT_BYTES)
