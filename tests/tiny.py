"""A tiny but real project: two folders of real digits with overlapping classes, a random tiny CLIP and two experts.

Everything the pipeline does to a user's own data and checkpoints, in a few seconds.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
CLASSES = {"low": ("zero", "one", "two", "three"), "high": ("two", "three", "four", "five")}
TRAIN_A_CLASS, TEST_A_CLASS = 12, 4


@dataclass(frozen=True)
class Tiny:
    """Where the project lies, and its configuration as plain data."""

    root: Path
    config: dict[str, Any]

    def write(self, name: str = "tiny.yaml", **changes: Any) -> Path:
        """A configuration file, with top-level keys replaced by `changes`."""
        path = self.root / name
        path.write_text(yaml.safe_dump({**self.config, **changes}, sort_keys=False), encoding="utf-8")
        return path


def make_tiny(root: Path) -> Tiny:
    """Write images, model configuration and checkpoints below `root`; equal bytes every time."""
    _write_images(root / "images")
    _write_models(root / "models")
    tasks = [
        {"name": name, "source": {"kind": "folder", "path": str(root / "images" / name)}, "templates": ["a digit {}."]}
        for name in CLASSES
    ]
    config = {
        "name": "tiny",
        "store": str(root / "store"),
        "tasks": tasks,
        "models": {
            "kind": "checkpoints",
            "model": str(root / "models" / "tiny_clip.json"),
            "base": str(root / "models" / "base.safetensors"),
            "experts": {name: str(root / "models" / f"{name}.safetensors") for name in CLASSES},
        },
        "shard": {"images_per_shard": 32},
        "fit_head": {"steps": 6, "batch_size": 16, "checkpoint_every": 2},
        "index": {"sample": 96, "recall_sample": 16, "max_isolated": 0.1, "rows_per_partition": 80},
        "fit_router": {"steps": 4, "batch_per_task": 4, "contrastive_anchors": 2, "checkpoint_every": 2},
        # One of each need: nothing, activations, batches, task labels, labelled validation.
        "baselines": {
            "validation_per_task": 8,
            "methods": {
                "task_arithmetic": {},
                "regmean": {},
                "bmm": {"trials": 2},
                "adamerging": {"steps": 2},
                "surgery": {"steps": 2},
                "twin_merging": {},
            },
        },
        "corrupt": {"corruptions": ["brightness", "contrast"], "levels": {"L1": 1, "L3": 5}},
        "report": {"dark": False},
        "executor": {"kind": "serial"},
        "tracking": {"enabled": False},
    }
    return Tiny(root, config)


def _write_images(root: Path) -> None:
    from pipeline.data.packages import DIGITS, PackageSource

    source = PackageSource(dataset="digits")
    wanted = {"train": TRAIN_A_CLASS, "test": TEST_A_CLASS}
    for block in source.blocks(10_000):
        by_class: dict[str, list[bytes]] = {name: [] for name in DIGITS}
        for item, data in source.read(block):
            assert isinstance(data, bytes) and item.label is not None
            by_class[item.label].append(data)
        for position, (task, names) in enumerate(CLASSES.items()):
            for name in names:
                folder = root / task / block.split / name
                folder.mkdir(parents=True)
                start = position * wanted[block.split]  # the two tasks share classes and no image
                for number in range(wanted[block.split]):
                    (folder / f"{number:03d}.png").write_bytes(by_class[name][start + number])


def _write_models(root: Path) -> None:
    from pipeline.backbones.open_clip import load_backbone
    from pipeline.formats.checkpoints import write_safetensors

    root.mkdir(parents=True)
    (root / "tiny_clip.json").write_text(json.dumps(CLIP), encoding="utf-8")
    state = load_backbone(root / "tiny_clip.json", seed=0).model.state_dict()
    write_safetensors(root / "base.safetensors", state)
    for seed, task in enumerate(CLASSES):
        generator = torch.Generator().manual_seed(seed)
        expert = {
            name: value + 0.02 * torch.randn(value.shape, generator=generator)
            for name, value in state.items()
            if name.startswith("visual.")
        }
        write_safetensors(root / f"{task}.safetensors", expert)
