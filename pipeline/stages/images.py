"""Images of shards at the model's input size: one shard whole, rows of the pool, or labelled images to train on.

Shape letters: N images, S input side, B batch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.backbones.open_clip import Backbone
from pipeline.data.images import decode_image
from pipeline.formats.image_bank import ImageBank
from pipeline.formats.schemas import EMBEDDED, SAMPLES
from pipeline.formats.shards import read_shard
from pipeline.formats.tables import read_table
from pipeline.stages.pool import Pool
from pipeline.store import Artefact

ToInput = Callable[[bytes], NDArray[np.uint8]]


@dataclass(frozen=True)
class ShardImages:
    """The images of one shard: ids, pixels uint8 [N, S, S, 3], and the ids that failed to decode with the reason."""

    sample_ids: list[str]
    pixels: Tensor
    faults: dict[str, str]

    @classmethod
    def read(cls, shard: Artefact, to_input: ToInput, without: AbstractSet[str] = frozenset()) -> Self:
        """Decode a shard in its order, leaving out the ids in `without`."""
        ids: list[str] = []
        pixels: list[NDArray[np.uint8]] = []
        faults: dict[str, str] = {}
        for sample in read_shard(shard.file("images.tar")):
            if sample.sample_id in without:
                continue
            try:
                pixels.append(to_input(sample.image))
                ids.append(sample.sample_id)
            except (OSError, ValueError, SyntaxError) as error:
                faults[sample.sample_id] = f"does not decode: {error}"
        stacked = np.stack(pixels) if pixels else np.zeros((0, 1, 1, 3), np.uint8)
        return cls(ids, torch.from_numpy(stacked), faults)


def left_out(sample_ids: Iterable[str], images: ShardImages) -> list[str]:
    """Those of a shard's ids that `images` does not hold, in their order."""
    kept = set(images.sample_ids)
    return [sample_id for sample_id in sample_ids if sample_id not in kept]


def to_input_of(backbone: Backbone) -> ToInput:
    """Encoded bytes to uint8 [S, S, 3], as `backbone` wants them."""
    return lambda data: backbone.to_input(decode_image(data))


class PoolImages:
    """Images by global row of the pool, decoded on demand within a memory budget; a context that closes the shards."""

    def __init__(self, shards: Sequence[Artefact], pool: Pool, backbone: Backbone) -> None:
        by_unit = {shard.unit: shard for shard in shards}
        ordered = [by_unit[unit.unit] for unit in pool.units]
        self._bank = ImageBank([shard.file("images.tar") for shard in ordered], to_input_of(backbone))
        rows: list[int] = []
        first = 0
        # Embedding may have left images out, so a row of the pool is found by its sample id.
        for shard, unit in zip(ordered, pool.units, strict=True):
            ids = read_table(shard.file("samples.parquet"), SAMPLES, ["sample_id"])["sample_id"].to_pylist()
            place = {name: number for number, name in enumerate(ids)}
            kept = read_table(unit.file("samples.parquet"), EMBEDDED, ["sample_id"])["sample_id"].to_pylist()
            rows += [first + place[name] for name in kept]
            first += len(ids)
        self._rows = np.asarray(rows, dtype=np.int64)

    def __getitem__(self, rows_B: Tensor) -> Tensor:
        """uint8 [B, S, S, 3]."""
        return self._bank.batch(self._rows[rows_B.numpy()])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bank.close()


class LabelledImages:
    """All images of some shards with their labels, in memory: what the demo's own models are trained on."""

    def __init__(
        self, shards: Sequence[Artefact], backbone: Backbone, class_index: Mapping[str, Mapping[int, int]]
    ) -> None:
        """`class_index[task][label]` is the class number to train towards."""
        pixels, labels = [], []
        for shard in shards:
            images = ShardImages.read(shard, to_input_of(backbone))
            table = read_table(shard.file("samples.parquet"), SAMPLES, ["sample_id", "label"])
            known = dict(zip(table["sample_id"].to_pylist(), table["label"].to_pylist(), strict=True))
            index = class_index[shard.report["notes"]["task"]]
            chosen = [row for row, name in enumerate(images.sample_ids) if known[name] is not None]
            pixels.append(images.pixels[chosen])
            labels += [index[known[images.sample_ids[row]]] for row in chosen]
        self._pixels, self._labels = torch.cat(pixels), torch.tensor(labels)

    def __len__(self) -> int:
        return len(self._labels)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` images uint8 [B, S, S, 3] and their classes [B], drawn with replacement."""
        rows = torch.randint(len(self), (count,), generator=generator)
        return self._pixels[rows], self._labels[rows]
