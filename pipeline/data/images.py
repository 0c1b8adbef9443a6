"""Encoded images: checked before use, decoded, and encoded from arrays."""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline.data.items import Reject

# Pillow also opens formats that call other programs (EPS runs Ghostscript); untrusted files never reach those.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # MPO: several JPEGs in one file, the first is taken
MAX_PIXELS = 50_000_000
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError, struct.error, zlib.error)


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image that decodes."""

    width: int
    height: int
    extension: str


def inspect_image(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageFacts | Reject:
    """Size and kind of an image that decodes to its last byte, or why it is rejected.

    The size is judged on the header: nothing is decoded of an image with more than `max_pixels`.
    """
    if not data:
        return Reject("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)  # odd metadata is not our concern
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                return Reject(f"oversized: {width}x{height} is {width * height} pixels, the limit is {max_pixels}")
            if width * height == 0:
                return Reject(f"zero-size: {width}x{height}")
            image.load()
            image.convert("RGB")
    except UnidentifiedImageError:
        return Reject(f"not an image of a known format ({', '.join(FORMATS)})")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return Reject(f"oversized: {' '.join(str(error).split())}")
    except _BROKEN as error:
        return Reject(f"does not decode: {' '.join(str(error).split())[:160] or type(error).__name__}")
    kind = image.format or ""
    return ImageFacts(width, height, _EXTENSIONS.get(kind, kind.lower()))


def decode_image(data: bytes) -> Image.Image:
    """The image that `inspect_image` accepted, fully read."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.load()
    return image


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """PNG bytes of a grey [H,W] or colour [H,W,3] array; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=False, compress_level=6)
    return buffer.getvalue()
