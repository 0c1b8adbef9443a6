"""safetensors files: their headers, and writing one tensor at a time into a file laid out beforehand.

The format: 8 bytes header length (little endian), a JSON header padded with spaces, then the values.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.formats.spans import OpenFile, Span, TensorFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = 8
_MAX_HEADER = 100_000_000  # the reference implementation's own bound


def open_safetensors(path: Path) -> TensorFile:
    """What the file's header tells, checked against the file's size; no value is read.

    Raises DataError for a file cut short, a header that is none, or a dtype that torch does not have.
    """
    file = OpenFile(path)
    length = int.from_bytes(file.head(_LENGTH), "little")
    if file.size_bytes < _LENGTH or not 2 <= length <= _MAX_HEADER:
        raise DataError(f"{path}: not a safetensors file (no header); {_what_is(file)}")
    text = file.head(length, _LENGTH)
    if len(text) < length:
        raise DataError(f"{path}: not a readable safetensors file: cut short within its header; copy it again")
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        spans = {name: _span(file, _LENGTH + length, entry) for name, entry in entries}
    except KeyError as error:
        raise DataError(f"{path}: holds tensors of dtype {error}, which cannot be merged; convert them") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a safetensors file (its header: {error}); {_what_is(file)}") from None
    end = _LENGTH + length
    for name, span in spans.items():
        if span.offset != end or end + span.size_bytes != _LENGTH + length + header[name]["data_offsets"][1]:
            raise DataError(
                f"{path}: not a readable safetensors file: {name} does not lie where it must; fetch it again"
            )
        end += span.size_bytes
    if end != file.size_bytes:
        state = "cut short" if file.size_bytes < end else "followed by bytes that are no tensor"
        raise DataError(
            f"{path}: not a readable safetensors file: {file.size_bytes:,} bytes where its header says {end:,}; "
            f"it is {state}, copy it again"
        )
    return TensorFile(file, spans, {str(key): str(value) for key, value in metadata.items()})


def _span(file: OpenFile, start: int, entry: dict[str, Any]) -> Span:
    return Span(file, start + int(entry["data_offsets"][0]), DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])))


def _what_is(file: OpenFile) -> str:
    """What a file that is no safetensors file may be, by its first bytes."""
    head = file.head(4)
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return "it is a torch file, name it .pt"
    return "it may be cut short, copy it again"


class SafetensorsWriter:
    """A safetensors file of known layout, written tensor by tensor, in any order, never held in memory.

    Laid out as the reference implementation does it (by alignment, then by name), so equal content gives equal bytes.
    """

    def __init__(self, path: Path, header: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Create `path` with its header and room for all values; OSError where the disk has none."""
        layout: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        self._spans: dict[str, tuple[int, int]] = {}
        end = 0
        for name in sorted(header, key=lambda name: (-header[name].element_size(), name)):
            size = header[name].numel() * header[name].element_size()
            layout[name] = {
                "dtype": _NAMES[header[name].dtype],
                "shape": list(header[name].shape),
                "data_offsets": [end, end + size],
            }
            self._spans[name] = (end, size)
            end += size
        text = json.dumps(layout, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _LENGTH)
        self.path = path
        self.digests: dict[str, str] = {}
        self._header = header
        self._start = _LENGTH + len(text)
        self.size_bytes = self._start + end
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.posix_fallocate(self._descriptor, 0, self.size_bytes)
            _write_at(self._descriptor, len(text).to_bytes(_LENGTH, "little") + text, 0)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, value: Tensor) -> None:
        """Put one tensor into its place; its sha256 is kept in `digests`."""
        wanted = self._header[name]
        assert name not in self.digests, f"{name} came twice"
        assert (value.shape, value.dtype) == (wanted.shape, wanted.dtype), f"{name}: {value.shape}, {value.dtype}"
        raw = tensor_bytes(value)
        offset, size = self._spans[name]
        assert len(raw) == size
        self.digests[name] = hashlib.sha256(raw).hexdigest()
        _write_at(self._descriptor, raw, self._start + offset)

    def finish(self) -> None:
        """Flush everything to the disk, once, and close."""
        missing = self._spans.keys() - self.digests.keys()
        assert not missing, f"never written: {sorted(missing)[:5]}"
        os.fsync(self._descriptor)
        # What is verified next is then read from the disk and not from memory.
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self.close()

    def close(self) -> None:
        """Close the file, finished or not."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def tensor_bytes(value: Tensor) -> memoryview:
    """The tensor's values as bytes, row-major, without a copy where they lie so."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _write_at(descriptor: int, raw: bytes | memoryview, offset: int) -> None:
    rest = memoryview(raw)
    while rest:
        written = os.pwrite(descriptor, rest[: 64 << 20], offset)
        rest, offset = rest[written:], offset + written
