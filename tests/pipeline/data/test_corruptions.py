"""Corruptions: every named one works at small and large sizes, is seeded, and leaves the global generator alone."""

import subprocess
import sys

import numpy as np
import pytest

from pipeline.data.corruptions import ALL, DEFAULT, LEVELS, check_corruptions, corrupt, corruption_seed
from pipeline.errors import ConfigError

# Pictures on which a formula could divide by zero, and one with content.
SMALL = {
    "black": np.zeros((32, 32, 3), dtype=np.uint8),
    "white": np.full((32, 32, 3), 255, dtype=np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8),
}
LARGE = np.kron(SMALL["noise"], np.ones((7, 7, 1), dtype=np.uint8))


@pytest.mark.parametrize("corruption", ALL)
def test_every_corruption_works_at_32_pixels_at_every_level(
    corruption: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for pixels in SMALL.values():
        for severity in LEVELS.values():
            before = pixels.copy()
            corrupted = corrupt(pixels, corruption, severity, seed=3)
            assert corrupted.dtype == np.uint8 and corrupted.shape == pixels.shape
            assert np.array_equal(corrupted, corrupt(pixels, corruption, severity, seed=3))
            assert np.array_equal(pixels, before)
    assert not np.array_equal(corrupt(SMALL["noise"], corruption, 5, seed=3), SMALL["noise"])
    assert capsys.readouterr().out == ""  # the package prints where it papers over a fault


@pytest.mark.parametrize("corruption", DEFAULT)
def test_the_default_list_works_at_224_pixels(corruption: str) -> None:
    corrupted = corrupt(LARGE, corruption, 3, seed=1)
    assert corrupted.shape == (224, 224, 3)
    assert np.array_equal(corrupted, corrupt(LARGE, corruption, 3, seed=1))


@pytest.mark.parametrize("corruption", ["gaussian_noise", "impulse_noise", "glass_blur", "motion_blur", "fog"])
def test_seeds_matter_and_numpys_generator_does_not(corruption: str) -> None:
    np.random.seed(11)
    expected = np.random.random(3)
    np.random.seed(11)
    first = corrupt(SMALL["noise"], corruption, 3, seed=5)
    assert np.array_equal(np.random.random(3), expected)
    assert np.array_equal(corrupt(SMALL["noise"], corruption, 3, seed=5), first)
    assert not np.array_equal(corrupt(SMALL["noise"], corruption, 3, seed=6), first)


def test_seed_depends_on_all_that_names_a_corrupted_image() -> None:
    seeds = {
        corruption_seed(*arguments)
        for arguments in (
            (0, "a", "fog", 1),
            (1, "a", "fog", 1),
            (0, "b", "fog", 1),
            (0, "a", "snow", 1),
            (0, "a", "fog", 3),
        )
    }
    assert len(seeds) == 5 and all(0 <= seed < 2**32 for seed in seeds)
    assert corruption_seed(0, "a", "fog", 1) in seeds


def test_unknown_names_and_small_images_are_refused() -> None:
    check_corruptions(DEFAULT, 32)
    with pytest.raises(ConfigError, match=r"there is no \['rain'\]; known: gaussian_noise"):
        check_corruptions(["fog", "rain"], 32)
    with pytest.raises(ConfigError, match=r"there is no \['fogg'\]; did you mean fog\?"):
        check_corruptions(["fogg"], 32)
    with pytest.raises(ConfigError, match="32 pixels or more, the model takes 28"):
        check_corruptions(DEFAULT, 28)


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, pipeline.data.corruptions, pipeline.data.sources\n"
        "print(*{'numba', 'cv2', 'torch', 'pyarrow'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
