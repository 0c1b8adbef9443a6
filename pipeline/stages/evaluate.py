"""evaluate: every model on every task at every level, with the task known and with nobody telling it.

Shape letters: B images, C classes, L unified classes, G layer groups, K experts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from bd_core.label_space import LabelSpace
from bd_core.metrics import (
    accuracy,
    area_under_risk_coverage,
    expected_calibration_error,
    relative_drop,
    reliability_bins,
)
from pipeline.backbones.open_clip import Backbone
from pipeline.config import Spec
from pipeline.costs import PRICE
from pipeline.formats.schemas import PREDICTIONS, TEST_IMAGES
from pipeline.formats.tables import read_table, write_table
from pipeline.formats.vectors import read_vectors
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.corrupt import CLEAN
from pipeline.stages.cost import price_per_sample
from pipeline.stages.fit_head import class_heads, label_space, unified_heads
from pipeline.stages.merged_files import (
    MERGED,
    Merged,
    is_compressed,
    open_merged,
    read_recipe,
    tell_fallback,
    uncompressed,
)
from pipeline.stages.models import open_backbone
from pipeline.stages.predictors import Routed, Static, features_of
from pipeline.store import Artefact

SCORES = ("accuracy", "ece", "aurc")
PRICED_IMAGES = 16  # a batch as small as a service has: routing costs most there


class EvaluateSpec(Spec):
    """How predictions are judged."""

    bins: int = Field(default=15, ge=1, description="of the calibration error and the reliability diagram")
    grouped_distance: float | None = Field(
        default=None,
        gt=0,
        description="routed models share one merged copy among samples whose weights lie this near; None: never",
    )
    unseen: tuple[str, ...] = Field(
        default=(), description="tasks that are only evaluated: no expert of theirs is merged, no image is fitted on"
    )
    compare_dense: bool = Field(
        default=True, description="also run compressed models with whole task vectors, and tell the difference"
    )


class Evaluate(Stage):
    """Measures one model a unit: the references, every competitor, and BD-Merging."""

    name: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("base", "experts", *MERGED, "corrupt", "fit_head")
    what: ClassVar[str] = "evaluate every model, clean and corrupted"
    spec: EvaluateSpec

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit a model."""
        shared = (*inputs["base"], *inputs["corrupt"])
        union = json.loads(inputs["fit_head"][0].file("config.json").read_text(encoding="utf-8"))["label_union"]
        references = {
            "pretrained": shared,
            "experts": (*shared, *inputs["experts"]),
        }
        settings = {"label_union": union}
        units = [Unit(name, inputs=given, settings=settings) for name, given in references.items()]
        if self.spec.grouped_distance is not None:
            # Which samples share a copy depends on the batch they come in: here it is no matter of speed alone.
            settings = {**settings, "batch_size": self.resources.batch_size}
        for model in (model for stage in MERGED for model in inputs[stage]):
            compared = self.spec.compare_dense and is_compressed(read_recipe(model.path))
            experts = inputs["experts"] if compared else ()
            units.append(Unit(model.unit, inputs=(*shared, *experts, model), settings=settings))
        return units

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write `metrics.json` and `predictions.parquet`."""
        base = unit.one("base")
        backbone = open_backbone(base)
        backbone.model.to(self.device)
        merged = open_merged(unit, backbone, self.device, self.spec.grouped_distance)
        report = StageReport(rows_in=0, rows_out=0)
        judge = self._judged(unit, merged, backbone, report)
        report.rows_in = report.rows_out = judge.n_images
        metrics = judge.metrics(unit.id)
        if isinstance(merged.predictor, Routed):
            model = merged.predictor.merged
            metrics["mode"] = model.mode
            if model.mode == "grouped":
                metrics["grouped"] = {"distance": model.max_distance, "weight_error_bound": model.weight_error_bound()}
            report.notes |= tell_fallback(model, f"evaluate {unit.id}")
            if unit.of("experts"):
                whole = self._judged(unit, uncompressed(unit, merged, self.device), backbone, report)
                metrics["compared_with_dense"] = _difference(metrics, whole.metrics(unit.id))
        if merged.method is not None and merged.cost["extra_parameters"]:
            with report.span("measure price"):
                report.metrics[PRICE] = self._price(unit, merged, backbone)
        (out_dir / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        write_table(out_dir / "predictions.parquet", PREDICTIONS, judge.predictions().to_pydict())
        means = metrics["protocols"]["task_known"]
        found = {f"task_known/{level}": means[level]["mean"]["accuracy"] for level in means}
        report.metrics |= {name: value for name, value in found.items() if value is not None}
        report.notes |= {"unlabelled": judge.unlabelled()}
        return report

    def _price(self, unit: Unit, merged: Merged, backbone: Backbone) -> float:
        """Seconds an image by those of the plain tower, here and now: of no file, since clocks differ."""
        part = next(part for part in unit.of("corrupt") if part.report["rows_out"])
        task = part.report["notes"]["task"]
        pixels = torch.from_numpy(read_vectors(part.file("images.npy"))[:PRICED_IMAGES].copy()).to(self.device)
        plain = Static(backbone, backbone.visual)
        return price_per_sample(
            lambda images: merged.predictor.features(images, task), lambda images: plain.features(images, task), pixels
        )

    def _judged(self, unit: Unit, merged: Merged, backbone: Backbone, report: StageReport) -> "_Judge":
        """The judge of `merged`, having seen every test image."""
        base = unit.one("base")
        space = label_space(base, unit.settings["label_union"])
        heads = {task: head.float() for task, head in class_heads(base).items()}
        judge = _Judge(self.spec, merged, heads, unified_heads(base, space), space, backbone.logit_scale)
        for part in unit.of("corrupt"):
            pixels = torch.from_numpy(read_vectors(part.file("images.npy")).copy())
            if not len(pixels) or not merged.knows(part.report["notes"]["task"]):
                continue
            with report.span("forward_backward"):
                features, weights = features_of(
                    merged.predictor, pixels, part.report["notes"]["task"], self.resources.batch_size, self.device
                )
            judge.add(part, features, weights)
        return judge


class _Judge:
    """Collects predictions and turns them into the metrics file."""

    def __init__(
        self,
        spec: EvaluateSpec,
        merged: Merged,
        heads: Mapping[str, Tensor],
        unified_LD: Tensor,
        space: LabelSpace,
        logit_scale: float,
    ) -> None:
        self._spec, self._merged, self._heads, self._space = spec, merged, heads, space
        self._unified_LD, self._scale = unified_LD, logit_scale
        self._tables: list[pa.Table] = []
        self._weights: dict[tuple[str, str], list[Tensor]] = {}
        self._levels: list[str] = []

    def add(self, part: Artefact, features_BD: Tensor, weights_BGK: Tensor | None) -> None:
        """Judge the images of one corrupt unit."""
        task, level = part.report["notes"]["task"], part.report["notes"]["level"]
        samples = read_table(part.file("samples.parquet"), TEST_IMAGES, ["sample_id", "label"])
        labels = torch.tensor([-1 if label is None else label for label in samples["label"].to_pylist()])
        known = (self._scale * features_BD @ self._heads[task].T).softmax(-1)
        free = (self._scale * features_BD @ self._unified_LD.T).softmax(-1)
        unified = torch.tensor((*self._space.maps[task], -1))[labels]
        routed = self._merged.routed and weights_BGK is not None
        if weights_BGK is not None:
            self._weights.setdefault((level, task), []).append(weights_BGK)
        flat = [None] * len(labels) if not routed else weights_BGK.flatten(1).tolist()  # type: ignore[union-attr]
        if level not in self._levels:
            self._levels.append(level)
        self._tables.append(
            pa.table(
                {
                    "sample_id": samples["sample_id"],
                    "task": pa.array([task] * len(labels), pa.string()),
                    "level": pa.array([level] * len(labels), pa.string()),
                    "label": pa.array(labels.numpy(), pa.int32()),
                    "prediction": pa.array(known.argmax(-1).numpy(), pa.int32()),
                    "confidence": pa.array(known.amax(-1).numpy(), pa.float32()),
                    "label_free": pa.array(unified.numpy(), pa.int32()),
                    "prediction_free": pa.array(free.argmax(-1).numpy(), pa.int32()),
                    "confidence_free": pa.array(free.amax(-1).numpy(), pa.float32()),
                    "weights": pa.array(flat, pa.list_(pa.float32())),
                }
            )
        )

    @property
    def n_images(self) -> int:
        """Images judged, once a level."""
        return sum(len(table) for table in self._tables)

    def predictions(self) -> pa.Table:
        """One row an image and level."""
        return pa.concat_tables(self._tables)

    def unlabelled(self) -> dict[str, int]:
        """{task: test images without a label}; they are predicted and routed, and no accuracy counts them."""
        columns = self.predictions().to_pandas()
        without = columns[(columns["label"] < 0) & (columns["level"] == CLEAN)]
        return {task: int((without["task"] == task).sum()) for task in self._heads}

    def metrics(self, model: str) -> dict[str, Any]:
        """The content of `metrics.json`."""
        columns = self.predictions().to_pandas()
        columns = columns[columns["label"] >= 0]
        seen = columns[~columns["task"].isin(self._spec.unseen)]
        protocols: dict[str, Any] = {"task_known": self._protocol(columns, "")}
        protocols["task_free"] = self._protocol(columns, "_free") if self._merged.task_free else None
        return {
            "model": model,
            "title": self._merged.title,
            "method": self._merged.method,
            "tasks": list(self._heads),
            "unseen": list(self._spec.unseen),
            "levels": self._levels,
            "protocols": protocols,
            "reliability": {
                level: self._reliability(own) for level in self._levels if len(own := seen[seen["level"] == level])
            },
            "router": self._router(),
            "mode": None,  # of the per-sample merge; None where nothing is routed
            "grouped": None,
            "compared_with_dense": None,
            "cost": self._merged.cost,
        }

    def _protocol(self, columns: Any, suffix: str) -> dict[str, Any]:
        """{level: scores of every task, their mean, and of unseen tasks, which are not in it, a mean of their own}."""
        found: dict[str, Any] = {}
        of_mean = {"mean": [task for task in self._heads if task not in self._spec.unseen]}
        if self._spec.unseen:
            of_mean["mean_unseen"] = list(self._spec.unseen)
        for level in self._levels:
            tasks = {}
            for task in self._heads:
                own = columns[(columns["level"] == level) & (columns["task"] == task)]
                tasks[task] = {"n": len(own), **self._scores(own, suffix)}
            found[level] = {"tasks": tasks}
            for which, chosen in of_mean.items():
                measured = [tasks[task] for task in chosen if tasks[task]["n"]]
                mean = {name: _mean([scores[name] for scores in measured]) for name in SCORES}
                clean = found.get(CLEAN, {}).get(which, mean)["accuracy"]
                found[level][which] = mean | {"relative_drop": _drop(clean, mean["accuracy"])}
        return found

    def _scores(self, own: Any, suffix: str) -> dict[str, float | None]:
        """Accuracy, calibration error and area under risk-coverage; None where no image has a label."""
        if not len(own):
            return dict.fromkeys(SCORES)
        prediction, label = (torch.tensor(own[f"{name}{suffix}"].to_numpy()) for name in ("prediction", "label"))
        confidence, correct = torch.tensor(own[f"confidence{suffix}"].to_numpy()), prediction == label
        return {
            "accuracy": accuracy(prediction, label),
            "ece": expected_calibration_error(confidence, correct, bins=self._spec.bins),
            "aurc": area_under_risk_coverage(confidence, correct),
        }

    def _reliability(self, own: Any) -> dict[str, list[float]]:
        correct = torch.tensor((own["prediction"] == own["label"]).to_numpy())
        bins = reliability_bins(torch.tensor(own["confidence"].to_numpy()), correct, bins=self._spec.bins)
        return {name: getattr(bins, name).tolist() for name in ("confidence", "accuracy", "count")}

    def _router(self) -> dict[str, Any] | None:
        if not self._weights:
            return None
        mean = {
            level: {task: torch.cat(self._weights[level, task]).mean(0).tolist() for task in self._heads}
            for level in self._levels
        }
        return {"groups": self._merged.groups, "experts": self._merged.experts, "mean_weights": mean}


def _difference(metrics: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """{protocol: {level: mean accuracy minus that with whole task vectors}}: what compression cost, in shares."""
    found: dict[str, dict[str, float | None]] = {}
    for protocol, levels in metrics["protocols"].items():
        found[protocol] = {}
        for level, cell in levels.items():
            mine, theirs = cell["mean"]["accuracy"], whole["protocols"][protocol][level]["mean"]["accuracy"]
            found[protocol][level] = None if mine is None or theirs is None else mine - theirs
    return found


def _drop(clean: float | None, value: float | None) -> float | None:
    if clean is None or value is None:
        return None
    return relative_drop(clean, value) if clean else 0.0


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
