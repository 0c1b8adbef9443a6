"""Image inspection: what decodes is measured, everything else is a reject with a reason, and bombs never unfold."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images import ImageFacts, decode_image, encode_png, inspect_image
from pipeline.data.items import Reject


def encoded(kind: str, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("kind", "mode", "extension"),
    [
        ("PNG", "RGB", "png"),
        ("PNG", "P", "png"),
        ("PNG", "RGBA", "png"),
        ("JPEG", "L", "jpg"),
        ("JPEG", "CMYK", "jpg"),
        ("WEBP", "RGB", "webp"),
        ("BMP", "RGB", "bmp"),
        ("GIF", "P", "gif"),
        ("TIFF", "RGB", "tif"),
        ("PPM", "L", "ppm"),
    ],
)
def test_images_that_decode_are_measured(kind: str, mode: str, extension: str) -> None:
    data = encoded(kind, mode=mode)
    assert inspect_image(data) == ImageFacts(40, 30, extension)
    assert decode_image(data).convert("RGB").size == (40, 30)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_images_are_rejects(kind: str, kept: float) -> None:
    data = encoded(kind)
    facts = inspect_image(data[: int(len(data) * kept)])
    assert isinstance(facts, Reject)
    assert facts.reason.startswith(("does not decode", "not an image"))


def test_no_image_is_a_reject() -> None:
    assert inspect_image(b"") == Reject("empty file")
    for data in (b"\0", b"hello world", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg></svg>"):
        facts = inspect_image(data)
        assert isinstance(facts, Reject) and facts.reason.startswith("not an image"), data


def test_decompression_bombs_are_judged_on_the_header() -> None:
    for width, height in ((8_000, 8_000), (12_000, 12_000), (30_000, 30_000)):
        facts = inspect_image(png_header(width, height))
        assert isinstance(facts, Reject) and facts.reason.startswith("oversized"), facts
    assert inspect_image(encoded("PNG"), max_pixels=1199) == Reject(
        "oversized: 40x30 is 1200 pixels, the limit is 1199"
    )
    assert isinstance(inspect_image(encoded("PNG"), max_pixels=1200), ImageFacts)


def test_zero_size_is_a_reject() -> None:
    for size in ((0, 10), (10, 0)):
        assert isinstance(inspect_image(png_header(*size)), Reject)


def test_a_png_with_a_flipped_bit_is_a_reject() -> None:
    data = bytearray(encoded("PNG"))
    data[len(data) // 2] ^= 0x10
    assert isinstance(inspect_image(bytes(data)), Reject)


def test_any_bytes_give_facts_or_a_reason() -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"):
        for _ in range(60):
            data = bytearray(encoded(kind, (8, 8)))
            for position in rng.integers(0, len(data), 5):
                data[position] = int(rng.integers(256))
            assert isinstance(inspect_image(bytes(data)), ImageFacts | Reject)


def test_encoding_is_lossless_and_repeatable() -> None:
    for shape in ((5, 7), (5, 7, 3)):
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        data = encode_png(pixels)
        assert data == encode_png(pixels.copy())
        assert np.array_equal(np.asarray(decode_image(data)), pixels)
