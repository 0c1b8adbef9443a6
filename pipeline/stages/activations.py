"""activations: what each expert's weights are multiplied by on unlabelled images, once for every method that asks.

Shape letters: K experts, I inputs of a weight.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bd_core.grams import InputMoments
from pipeline.config import Resources, Spec
from pipeline.formats.checkpoints import write_safetensors
from pipeline.stage import Inputs, Stage, StageReport, Unit
from pipeline.stages.cost import watched
from pipeline.stages.images import PoolImages
from pipeline.stages.models import VISUAL, open_backbone
from pipeline.stages.pool import Pool
from pipeline.stages.shard import of_split
from pipeline.store import Artefact

GRAMS, SQUARES = "grams.safetensors", "squares.safetensors"
IMAGES_A_PASS = 16  # fixed, so that no option of speed changes the last bit of a sum


class ActivationsSpec(Spec):
    """How many images an expert is run on."""

    samples: int = Field(
        default=64, ge=1, description="unlabelled images a task; LOT Merging takes 16 to 64, RegMean more"
    )


class Activations(Stage):
    """Runs every expert on images of its own task. No unit unless a configured method needs one."""

    name: ClassVar[str] = "activations"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("shard", "base", "experts", "embed")
    what: ClassVar[str] = "collect the experts' Gram matrices"
    spec: ActivationsSpec

    def __init__(self, spec: ActivationsSpec, resources: Resources, seed: int, *, wanted: bool) -> None:
        super().__init__(spec, resources, seed)
        self._wanted = wanted

    def units(self, inputs: Inputs) -> list[Unit]:
        """One unit an expert, or none."""
        if not self._wanted:
            return []
        # Shards are read for their images only: the labels in them are neither opened nor part of the key.
        return [
            Unit(
                expert.unit,
                inputs=(
                    *inputs["base"],
                    expert,
                    *(e for e in inputs["embed"] if e.report["notes"]["task"] == expert.unit),
                ),
                payload=of_split(inputs["shard"], "train", expert.unit),
            )
            for expert in inputs["experts"]
        ]

    def process(self, unit: Unit, out_dir: Path) -> StageReport:
        """Write `grams.safetensors`, [I, I] under each weight's name, and `squares.safetensors`, [I] a norm's scale."""
        pool = Pool.of(unit.inputs)
        backbone = open_backbone(unit.one("base"))
        tower = backbone.visual
        tower.load_state_dict(load_file(unit.one("experts").file(VISUAL)))
        tower.to(self.device)
        generator = torch.Generator().manual_seed(self.seed or 0)
        rows = torch.randperm(pool.n_rows, generator=generator)[: self.spec.samples].sort().values
        moments = InputMoments(dict(tower.named_parameters()))
        report = StageReport(rows_in=len(rows), rows_out=len(rows))
        with PoolImages(unit.payload, pool, backbone) as images, report.span("decode"):
            pixels = images[rows]
        with watched(report, "forward"), torch.inference_mode(), moments:
            for part in torch.split(pixels, IMAGES_A_PASS):
                tower(backbone.normalise(part.to(self.device)))
        grams = moments.grams
        report.metrics |= {"weights": float(len(grams)), "images": float(len(rows))}
        write_safetensors(out_dir / GRAMS, grams)
        write_safetensors(out_dir / SQUARES, moments.squares)
        return report


class Stacked(Mapping[str, Tensor]):
    """K files of equally named tensors as one mapping to [K, ...]; a tensor is read when it is asked for, not kept."""

    def __init__(self, artefacts: Sequence[Artefact], tasks: Sequence[str], name: str) -> None:
        """The file `name` of the unit of each task, in the tasks' order."""
        of_task = {artefact.unit: artefact.file(name) for artefact in artefacts}
        self._files: list[Any] = [safe_open(of_task[task], framework="pt") for task in tasks]
        self._names = sorted(self._files[0].keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return torch.stack([file.get_tensor(name) for file in self._files])

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
