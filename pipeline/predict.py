"""predict: an exported model on a user's own images, from the artefact's directory alone.

Shape letters: B images, S input side, C classes, D feature width, G layer groups, K experts.
"""

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bd_core.dirichlet import opinion
from bd_core.head import EvidentialHead
from bd_core.label_space import LabelSpace, unify_heads, unify_labels
from pipeline.backbones.open_clip import Backbone, load_backbone
from pipeline.data.images import decode_image, inspect_image
from pipeline.data.items import Reject
from pipeline.errors import ConfigError, DataError
from pipeline.formats.predictions import Prediction
from pipeline.progress import Progress
from pipeline.record import read_record, run_ids
from pipeline.stages.fit_head import head_from
from pipeline.stages.merged_files import MERGED, SURGERY, Merged, Mode, open_directory, read_recipe
from pipeline.stages.model_card import PRETRAINED
from pipeline.stages.predictors import Routed
from pipeline.store import Store

STATIC = "static"


def find_artefact(model: str, root: Path, run: str | None) -> Path:
    """The directory of `model`: one itself, or the name of a merged model of a run (the newest) of the store in `root`.

    `ConfigError` with the nearest name where there is no such model.
    """
    if (Path(model) / "recipe.json").is_file():
        return Path(model)
    if "/" in model:
        state = "holds no recipe.json" if Path(model).is_dir() else "does not exist"
        raise ConfigError(f"{model} {state}: name a merged model of a run, or the directory of an exported one")
    if not root.is_dir():
        raise ConfigError(f"{model!r} is no exported model's directory, and store {root} does not exist; set --store")
    store = Store(root)
    known = run_ids(store)
    if not known:
        raise ConfigError(f"store {store.root} holds no run to take {model!r} from; name another store, or run first")
    record = read_record(store, run or known[-1])
    pinned = {unit: (stage, key) for stage in MERGED for unit, key in record.stages.get(stage, {}).items()}
    if model not in pinned:
        there = ", ".join(pinned) or "none yet; finish it with bd-merge run"
        close = difflib.get_close_matches(model, pinned, n=1)
        near = f"did you mean {close[0]!r}?" if close else f"it has {there}"
        raise ConfigError(f"run {record.run_id} has no merged model {model!r}; {near}")
    stage, key = pinned[model]
    found = store.find(stage, model, key)
    if found is None:
        raise DataError(f"{store.directory(stage, model, key)} is gone, damaged or not yet made; run it again")
    return found.path


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files named, and all below the folders named that are not hidden, these in order of their paths."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ConfigError(f"image {path} does not exist; correct the path")
        below = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        found += [f for f in below if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    if not found:
        raise ConfigError(f"{', '.join(map(str, paths))}: no file is there; name images, or folders of images")
    return found


@dataclass(frozen=True)
class Caller:
    """An exported model with the classes it chooses from: one task's, or the unified ones of all tasks."""

    merged: Merged
    backbone: Backbone
    classes: tuple[str, ...]
    head_CD: Tensor
    logit_scale: float
    evidence: EvidentialHead | None
    device: torch.device
    task: str = ""

    @classmethod
    def open(
        cls, directory: Path, *, task: str | None = None, mode: Mode | None = None, max_distance: float = 0.05
    ) -> Self:
        """The model in `directory`, on a CUDA device where one is there.

        `mode` and `max_distance` are those of MergedModel. `ConfigError` for a task it does not know or a mode it
        cannot run in, `DataError` for files that cannot be read.
        """
        try:
            return cls._open(directory, task, mode, max_distance)
        except (OSError, SafetensorError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{directory}: not a complete exported model ({reason}); export or copy it again") from None

    @classmethod
    def _open(cls, directory: Path, task: str | None, mode: Mode | None, max_distance: float) -> Self:
        recipe, tasks = read_recipe(directory), _read_json(directory / "classes.json")
        if task is not None and task not in tasks:
            close = difflib.get_close_matches(task, tasks, n=1)
            near = f"did you mean {close[0]!r}?" if close else f"it knows {', '.join(tasks)}."
            raise ConfigError(f"{directory.name} has no task {task!r}; {near} Without --task, all classes are open")
        if task is None and recipe["kind"] == SURGERY:
            raise ConfigError(f"{directory.name} corrects features task by task: name one, --task {' or '.join(tasks)}")
        if mode is not None and recipe["kind"] in (STATIC, SURGERY):
            raise ConfigError(f"{directory.name} is one static model and merges nothing per sample; leave --mode out")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        described = _read_json(directory / "backbone.json")
        backbone = _backbone(directory, described["model"], device)
        stored = load_file(directory / "class_heads.safetensors")
        heads = {name: stored[name].float() for name in tasks}
        evidence, space = _evidence(directory)
        space = space or unify_labels(tasks, "by_name")
        classes, head_CD = (space.classes, unify_heads(heads, space)) if task is None else (tasks[task], heads[task])
        return cls(
            merged=open_directory(directory, backbone, device, mode, max_distance),
            backbone=backbone,
            classes=tuple(classes),
            head_CD=head_CD.to(device),
            logit_scale=described["logit_scale"],
            evidence=evidence.to(device) if evidence is not None else None,
            device=device,
            task=task or "",
        )

    @property
    def mode(self) -> str:
        """How it merges: exact, low_rank, grouped, or static."""
        predictor = self.merged.predictor
        return predictor.merged.mode if isinstance(predictor, Routed) else STATIC

    def weight_error_bound(self) -> float | None:
        """In mode grouped: how far a parameter can lie from a sample's own, at most over all parameters."""
        predictor = self.merged.predictor
        if not isinstance(predictor, Routed) or predictor.merged.mode != "grouped":
            return None
        return max(predictor.merged.weight_error_bound().values())

    def predict(self, files: Sequence[Path], *, batch_size: int, progress: Progress | None = None) -> list[Prediction]:
        """One prediction a file, in order. A file that is no readable image is a reject with its reason."""
        shown = progress or Progress()
        batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
        shown.begin("predict", f"predict with {self.merged.title}", len(batches), 0)
        found: list[Prediction] = []
        for batch in batches:
            found += self._batch(batch)
            shown.step("predict", batch[-1].name)
        shown.end("predict", len(found), sum(each.reject is not None for each in found))
        return found

    def _batch(self, files: Sequence[Path]) -> Iterator[Prediction]:
        read = [(file, self._read(file)) for file in files]
        pixels = [image for _, image in read if not isinstance(image, Reject)]
        called = iter(self._call(torch.from_numpy(np.stack(pixels))) if pixels else ())
        for file, image in read:
            if isinstance(image, Reject):
                yield Prediction(str(file), reject=image.reason)
            else:
                yield Prediction(str(file), **next(called))

    def _read(self, file: Path) -> NDArray[np.uint8] | Reject:
        try:
            data = file.read_bytes()
        except OSError as error:
            return Reject(f"cannot be read: {error.strerror}")
        facts = inspect_image(data)
        return facts if isinstance(facts, Reject) else self.backbone.to_input(decode_image(data))

    @torch.inference_mode()
    def _call(self, pixels_BSS3: Tensor) -> list[dict[str, Any]]:
        predictor, pixels_BSS3 = self.merged.predictor, pixels_BSS3.to(self.device)
        uncertainty_B = weights_BK = None
        if isinstance(predictor, Routed):
            features_BD, weights_BGK, pretrained_BD = predictor.with_pretrained(pixels_BSS3)
            weights_BK = weights_BGK.mean(1).tolist()
            if self.evidence is not None:  # fitted on features of the pretrained model, not of the merged one
                uncertainty_B = opinion(self.evidence(pretrained_BD)).uncertainty.tolist()
        else:
            features_BD, _ = predictor.features(pixels_BSS3, self.task)
        best = (self.logit_scale * features_BD @ self.head_CD.T).softmax(-1).max(-1)
        return [
            {
                "prediction": self.classes[label],
                "probability": probability,
                "uncertainty": None if uncertainty_B is None else uncertainty_B[b],
                "weights": None if weights_BK is None else dict(zip(self.merged.experts, weights_BK[b], strict=True)),
                "mode": self.mode,
            }
            for b, (label, probability) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        ]


def _evidence(directory: Path) -> tuple[EvidentialHead | None, LabelSpace | None]:
    """The evidential head and its label space, which artefacts of BD-Merging hold."""
    if not (directory / "head.json").exists():
        return None, None
    return head_from(_read_json(directory / "head.json"), load_file(directory / "head.safetensors"))


def _backbone(directory: Path, model: str, device: torch.device) -> Backbone:
    """The image tower that the router reads, with its preprocessing; there is no text tower in an artefact."""
    backbone = load_backbone(directory / model if model.endswith(".json") else model)
    for name in (PRETRAINED, "base.safetensors"):
        if (directory / name).exists():
            backbone.visual.load_state_dict(load_file(directory / name))
            break
    backbone.model.to(device)
    return backbone


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
