"""fit_router: the router that merges per sample, fitted on unlabelled images, fixed pairs and nothing else.

Shape letters: B batch, A anchors of L_Dis, M other images of an anchor, K experts, G layer groups, D feature width.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from bd_core.losses import discrepancy_contrastive_loss, information_maximisation, unsupervised_loss
from bd_core.merged import MergedModel
from bd_core.router import Router
from pipeline.config import Spec
from pipeline.formats.checkpoints import write_safetensors
from pipeline.stage import Inputs, StageReport, Unit
from pipeline.stages.cost import watched
from pipeline.stages.fit_head import class_heads
from pipeline.stages.images import PoolImages
from pipeline.stages.merged_files import tell_fallback
from pipeline.stages.models import Experts, open_backbone
from pipeline.stages.pair_sampler import PairSampler
from pipeline.stages.pool import Pool
from pipeline.training.context import TrainingContext
from pipeline.training.fit_stage import FitStage
from pipeline.training.history import write_history
from pipeline.training.loop import optimise

Variant = Literal["task", "layer"]


class FitRouterSpec(Spec):
    """L_BD = L_Unsup + eta L_Dis (+ the information-maximisation term, ours). eta = 0.1 and 300 steps: the paper's."""

    variants: tuple[Variant, ...] = Field(default=("task", "layer"), min_length=1, max_length=2)
    steps: int = Field(default=300, ge=1)
    batch_per_task: int = Field(default=16, ge=2)
    learning_rate: float = Field(default=1e-3, gt=0, description="ours; AdaMerging's")
    contrastive_weight: float = Field(default=0.1, ge=0, description="eta of the paper")
    contrastive_anchors: int = Field(default=16, ge=1, description="drawn beside the task-balanced batch; ours")
    positives: int = Field(default=2, ge=1, description="of M+ drawn for each anchor")
    negatives: int = Field(default=2, ge=1, description="of M- drawn for each anchor")
    temperature: float = Field(default=0.1, gt=0)
    information_weight: float = Field(
        default=1.0, ge=0, description="of the entropy of the mean prediction per task; ours, 0 is the paper"
    )
    kind: Literal["mlp", "linear"] = "mlp"
    hidden: int | None = Field(default=None, ge=1, description="None: the backbone's width")
    null_expert: bool = Field(default=False, description="lets the router stay at theta_0; ours")
    workers: int = Field(default=1, ge=1)
    checkpoint_every: int = Field(default=50, ge=1)

    @field_validator("variants")
    @classmethod
    def _differ(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        if len(set(variants)) != len(variants):
            raise ValueError(f"{', '.join(variants)}: one is named twice; name each once")
        return variants


class FitRouter(FitStage):
    """Fits one router a variant: task-wise (K weights) and layer-wise (K weights for each layer group)."""

    name: ClassVar[str] = "fit_router"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("shard", "embed", "pairs", "base", "experts")
    what: ClassVar[str] = "fit the per-sample routers"
    spec: FitRouterSpec

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit a variant."""
        train = [shard for shard in inputs["shard"] if shard.report["notes"]["split"] == "train"]
        shared = (*inputs["base"], *inputs["experts"], *inputs["embed"], *inputs["pairs"])
        # Shards are read for their images only: the labels in them are neither opened nor part of the key.
        return [
            Unit(variant, inputs=shared, settings={"variant": variant}, payload=train) for variant in self.spec.variants
        ]

    def hashed_spec(self) -> dict[str, object]:
        """The spec without the list of variants: each unit's settings name its own."""
        return {name: value for name, value in super().hashed_spec().items() if name != "variants"}

    def fit(self, unit: Unit, out_dir: Path, context: TrainingContext) -> StageReport:
        """Fit; rank 0 writes `model.safetensors`, `config.json` and `history.parquet`."""
        pool = Pool.of(unit.inputs)
        report = StageReport(rows_in=pool.n_rows, rows_out=pool.n_rows)
        backbone, experts = open_backbone(unit.one("base")), Experts.of(unit.inputs)
        device = self.device
        merged = MergedModel(
            backbone.visual,
            experts.base_state,
            experts.states,
            groups=experts.groups if unit.settings["variant"] == "layer" else None,
        ).to(device)
        router = Router(
            backbone.width,
            experts.count,
            n_groups=experts.groups.n_groups if unit.settings["variant"] == "layer" else 1,
            hidden=self.spec.hidden,
            kind=self.spec.kind,
            null_expert=self.spec.null_expert,
            generator=torch.Generator().manual_seed(self.seed or 0),
        )
        tokens_NW, heads = pool.tokens(), class_heads(unit.one("base"))
        router.standardise(tokens_NW)
        with report.span("decode"):
            images = PoolImages(unit.payload, pool, backbone)
        loss = RouterLoss(
            self.spec,
            router.to(device),
            merged,
            heads=[backbone.logit_scale * heads[task].to(device) for task in experts.tasks],
            pairs=PairSampler.read(unit.of("pairs")),
            task_rows=task_rows(pool.tasks(), experts.tasks),
            tokens_NW=tokens_NW,
            pixels=lambda rows: backbone.normalise(images[rows]).to(device),
            share=context.world_size,
        )
        assert self.seed is not None
        with images, watched(report, "forward_backward"):
            history = optimise(
                router,
                loss,
                steps=self.spec.steps,
                learning_rate=self.spec.learning_rate,
                seed=self.seed,
                context=context,
                checkpoint_every=self.spec.checkpoint_every,
            )
        if 0 in context.ranks:  # of several workers, one tells it
            report.notes = tell_fallback(merged, f"fit_router {unit.id}")
        report.metrics |= {"final_loss": history[-1]["loss"], "anchors_with_pairs": float(loss.pairs.n_anchors)}
        write_safetensors(out_dir / "model.safetensors", router.state_dict())
        config = {
            "width": backbone.width,
            "experts": list(experts.tasks),
            "n_groups": router.n_groups,
            "groups": list(experts.groups.titles) if router.n_groups > 1 else ["all layers"],
            "hidden": self.spec.hidden,
            "kind": self.spec.kind,
            "null_expert": self.spec.null_expert,
        }
        (out_dir / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        write_history(out_dir / "history.parquet", history)
        return report


class RouterLoss:
    """The loss of one step: a task-balanced batch for L_Unsup, anchors with their neighbours beside it for L_Dis."""

    def __init__(
        self,
        spec: FitRouterSpec,
        router: Router,
        merged: MergedModel,
        *,
        heads: list[Tensor],
        pairs: PairSampler,
        task_rows: list[Tensor],
        tokens_NW: Tensor,
        pixels: Callable[[Tensor], Tensor],
        share: int,
    ) -> None:
        self.spec, self.router, self.merged, self.heads, self.pairs = spec, router, merged, heads, pairs
        self.task_rows, self.tokens_NW, self.pixels = task_rows, tokens_NW, pixels
        self.per_task = max(2, spec.batch_per_task // share)
        self.n_anchors = max(1, spec.contrastive_anchors // share) if spec.contrastive_weight and pairs.n_anchors else 0

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss and its terms for one batch drawn from `generator`."""
        spec = self.spec
        balanced = [rows[torch.randint(len(rows), (self.per_task,), generator=generator)] for rows in self.task_rows]
        rows_B = torch.cat(balanced)
        drawn = self.pairs.draw(self.n_anchors, spec.positives, spec.negatives, generator) if self.n_anchors else None
        if drawn is not None:
            rows_B = torch.cat([rows_B, drawn.anchor_A, drawn.others_AM.flatten()])
        weights = self.router(self.tokens_NW[rows_B].to(next(self.router.parameters()).device))
        features = nn.functional.normalize(self.merged(self.pixels(rows_B), weights=weights), dim=-1)
        logits = [
            part @ head.T
            for part, head in zip(torch.split(features, self.per_task)[: len(self.heads)], self.heads, strict=True)
        ]
        unsupervised = torch.stack([unsupervised_loss(each) for each in logits]).mean()
        information = torch.stack([information_maximisation(each) for each in logits]).mean()
        loss = unsupervised + spec.information_weight * information
        terms = {"l_unsup": unsupervised.item(), "information": information.item()}
        if drawn is not None:
            beside = features[self.per_task * len(self.heads) :]
            anchors, others = beside[: self.n_anchors], beside[self.n_anchors :]
            contrastive, used = discrepancy_contrastive_loss(
                anchors,
                others.reshape(self.n_anchors, -1, others.shape[-1]),
                drawn.positive_AM.to(features.device),
                drawn.valid_AM.to(features.device),
                spec.temperature,
            )
            loss = loss + spec.contrastive_weight * contrastive
            terms |= {"l_dis": contrastive.item(), "anchors": float(used)}
        return loss, terms


def task_rows(row_tasks: list[str], tasks: tuple[str, ...]) -> list[Tensor]:
    """Global rows of every task, in the tasks' order."""
    return [torch.tensor([row for row, own in enumerate(row_tasks) if own == task]) for task in tasks]
