"""ImageNet-C corruptions (Hendrycks and Dietterich 2019) of model inputs, seeded image by image.

The package `imagecorruptions` draws from NumPy's global generator. It is imported only when a corruption is applied: it
brings numba and OpenCV with it.
"""

import difflib
import hashlib
import threading
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ConfigError

# The paper's L1 to L3 as severities: ours, the paper does not say which they are.
LEVELS = {"L1": 1, "L2": 3, "L3": 5}
# Without `spatter`, which divides by zero where no drop falls on a small image.
ALL = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression", "saturate"),
)
# Ours: two or three of each family, quick, and still telling at 32 pixels. Left out by default are those that need
# numba's compiler (glass_blur), read a file for every image (frost) or do next to nothing (saturate, zoom_blur).
DEFAULT = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "motion_blur"),
    *("snow", "fog", "brightness"),
    *("contrast", "pixelate", "jpeg_compression"),
)
_TAKES_SEED = {"impulse_noise", "glass_blur"}
MIN_SIDE = 32
_GLOBAL_GENERATOR = threading.Lock()


def corrupt(pixels_HWC: NDArray[np.uint8], corruption: str, severity: int, seed: int) -> NDArray[np.uint8]:
    """`pixels_HWC` (uint8 RGB, at the model's input size) corrupted; equal arguments give equal pixels.

    `severity` is ImageNet-C's 1..5. NumPy's global generator is left as it was found.
    """
    assert pixels_HWC.dtype == np.uint8 and pixels_HWC.ndim == 3 and pixels_HWC.shape[2] == 3, pixels_HWC.shape
    assert 1 <= severity <= 5, severity
    function = _functions()[corruption]
    options = {"seed": seed} if corruption in _TAKES_SEED else {}
    with _GLOBAL_GENERATOR:
        before = np.random.get_state()
        np.random.seed(seed)
        try:
            corrupted = function(Image.fromarray(pixels_HWC), severity, **options)
        finally:
            np.random.set_state(before)
    result = np.asarray(corrupted).astype(np.uint8)
    assert result.shape == pixels_HWC.shape, f"{corruption} turned {pixels_HWC.shape} into {result.shape}"
    return result


def corruption_seed(seed: int, sample_id: str, corruption: str, severity: int) -> int:
    """A seed in [0, 2**32) for one corruption of one image; neither order nor shard of the image matter."""
    digest = hashlib.sha256(f"{seed}\0{sample_id}\0{corruption}\0{severity}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def check_corruptions(names: Sequence[str], side: int) -> None:
    """Raise ConfigError unless they can be applied here: names known, package installed, images of `side` large enough.

    Nothing is imported for it.
    """
    unknown = [name for name in names if name not in ALL]
    if unknown:
        near = difflib.get_close_matches(unknown[0], ALL, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(ALL)}"
        raise ConfigError(f"corrupt.corruptions: there is no {unknown!r}; {hint}")
    if find_spec("imagecorruptions") is None:
        raise ConfigError("corruptions need the package imagecorruptions-imaug; `make setup` installs it")
    if side < MIN_SIDE:
        raise ConfigError(
            f"the corruptions need images of {MIN_SIDE} pixels or more, the model takes {side}; no levels"
        )


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    try:
        from imagecorruptions import corruption_dict
    except ImportError as error:
        raise ConfigError(
            f"corruptions need the package imagecorruptions-imaug ({error}); `make setup` installs it"
        ) from None
    functions: dict[str, Callable[..., Any]] = corruption_dict
    return functions
