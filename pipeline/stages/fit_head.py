"""fit_head: the evidential head, fitted on cached features; no image is decoded and no label is read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from bd_core.dirichlet import opinion
from bd_core.head import EvidentialHead
from bd_core.label_space import LabelSpace, unify_heads, unify_labels
from bd_core.losses import evidential_loss, inverse_loss
from pipeline.config import Spec
from pipeline.formats.checkpoints import write_safetensors
from pipeline.stage import Inputs, StageReport, Unit
from pipeline.stages.pool import Pool
from pipeline.store import Artefact
from pipeline.training.context import TrainingContext
from pipeline.training.fit_stage import FitStage
from pipeline.training.history import write_history
from pipeline.training.loop import optimise


class FitHeadSpec(Spec):
    """L_Head = L_Ent + gamma L_Inv, L_Ent = entropy + lambda KL. lambda = gamma = 0.1 are the paper's."""

    steps: int = Field(default=300, ge=1)
    batch_size: int = Field(default=256, ge=2)
    learning_rate: float = Field(default=1e-4, gt=0, description="ours: the head starts at the zero-shot solution")
    kl_weight: float = Field(default=0.1, ge=0, description="lambda of the paper")
    inverse_weight: float = Field(default=0.1, ge=0, description="gamma of the paper")
    inverse_form: Literal["gated", "pearson"] = "gated"
    activation: Literal["softplus", "exp"] = "softplus"
    initial_confidence: float = Field(
        default=0.2, gt=0, lt=1, description="mean p_max the head is calibrated to before fitting; ours"
    )
    label_union: Literal["by_name", "concatenate"] = "by_name"
    workers: int = Field(default=1, ge=1)
    checkpoint_every: int = Field(default=100, ge=1)


class FitHead(FitStage):
    """Fits the evidential head on the features of the auxiliary pool."""

    name: ClassVar[str] = "fit_head"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("embed", "base")
    what: ClassVar[str] = "fit the evidential head on cached features"
    spec: FitHeadSpec

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit: the head."""
        return [Unit("head", inputs=(*inputs["embed"], *inputs["base"]))]

    def fit(self, unit: Unit, out_dir: Path, context: TrainingContext) -> StageReport:
        """Fit; rank 0 writes `model.safetensors`, `config.json` (label space included) and `history.parquet`."""
        spec, pool = self.spec, Pool.of(unit.inputs)
        report = StageReport(rows_in=pool.n_rows, rows_out=pool.n_rows)
        features_ND = pool.features()
        space = label_space(unit.one("base"), spec.label_union)
        head = EvidentialHead.from_class_heads(class_heads(unit.one("base")), space, activation=spec.activation)
        head.calibrate(features_ND, target_confidence=spec.initial_confidence)
        per_worker = max(2, spec.batch_size // context.world_size)

        def step_loss(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
            rows = torch.randint(len(features_ND), (per_worker,), generator=generator)
            alpha = head(features_ND[rows])
            entropic = evidential_loss(alpha, spec.kl_weight)
            inverse = inverse_loss(alpha, spec.inverse_form)
            seen = opinion(alpha.detach())
            return entropic + spec.inverse_weight * inverse, {
                "l_ent": entropic.item(),
                "l_inv": inverse.item(),
                "mean_p_max": seen.probability.amax(-1).mean().item(),
                "mean_u": seen.uncertainty.mean().item(),
            }

        assert self.seed is not None
        with report.span("forward_backward"):
            history = optimise(
                head,
                step_loss,
                steps=spec.steps,
                learning_rate=spec.learning_rate,
                seed=self.seed,
                context=context,
                checkpoint_every=spec.checkpoint_every,
            )
        with torch.no_grad():
            final = opinion(head(features_ND))
        report.metrics = {
            "mean_p_max": final.probability.amax(-1).mean().item(),
            "mean_u": final.uncertainty.mean().item(),
            "final_loss": history[-1]["loss"],
        }
        write_safetensors(out_dir / "model.safetensors", head.state_dict())
        config = {
            "activation": spec.activation,
            "label_union": spec.label_union,
            "width": features_ND.shape[1],
            "classes": list(space.classes),
            "maps": {task: list(indices) for task, indices in space.maps.items()},
        }
        (out_dir / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        write_history(out_dir / "history.parquet", history)
        return report


def label_space(base: Artefact, union: Literal["by_name", "concatenate"]) -> LabelSpace:
    """The unified label space over the tasks of `base`."""
    return unify_labels(json.loads(base.file("classes.json").read_text(encoding="utf-8")), union)


def class_heads(base: Artefact) -> dict[str, Tensor]:
    """{task: zero-shot head [C_k, D]} in the tasks' order."""
    heads = load_file(base.file("heads.safetensors"))
    return {task: heads[task] for task in json.loads(base.file("classes.json").read_text(encoding="utf-8"))}


def unified_heads(base: Artefact, space: LabelSpace) -> Tensor:
    """The stacked zero-shot heads over the unified label space [L, D]."""
    return unify_heads(class_heads(base), space)


def load_head(artefact: Artefact) -> tuple[EvidentialHead, LabelSpace]:
    """The fitted head and its label space."""
    config = json.loads(artefact.file("config.json").read_text(encoding="utf-8"))
    return head_from(config, load_file(artefact.file("model.safetensors")))


def head_from(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[EvidentialHead, LabelSpace]:
    """A head of this configuration holding `state`, and its label space."""
    space = LabelSpace(tuple(config["classes"]), {task: tuple(ids) for task, ids in config["maps"].items()})
    weight = torch.zeros(space.n_classes, config["width"])
    head = EvidentialHead(weight, activation=config["activation"])
    head.load_state_dict(dict(state))
    return head.eval(), space
