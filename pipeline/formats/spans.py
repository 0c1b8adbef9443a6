"""Tensors where they lie: values in a file, mapped when they are wanted and let go with the tensor."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipeline.errors import ConfigError, DataError

# Git Large File Storage leaves such a text where it did not fetch the file.
_LFS = b"version https://git-lfs"


class Source(Protocol):
    """One tensor that can be had any number of times."""

    @property
    def header(self) -> Tensor:
        """Shape and dtype, as a meta tensor."""
        ...

    @property
    def scratch_bytes(self) -> int:
        """Memory of its own that reading takes; 0 when the values are mapped."""
        ...

    def read(self) -> Tensor:
        """The values. Writing to them never changes a file."""
        ...


class OpenFile:
    """A file kept open, so that all is read from one version of it even when its name is given to another."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(f"checkpoint {path} does not exist; correct the path")
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"checkpoint {path} cannot be opened ({error.strerror}); check its permissions") from None
        weakref.finalize(self, os.close, self.descriptor)
        self.path = path
        self.size_bytes, self._changed_ns = self._state()
        if self.head(len(_LFS)) == _LFS:
            raise DataError(f"{path} is a Git LFS pointer, not the weights; fetch them: git lfs pull")

    def head(self, size: int, offset: int = 0) -> bytes:
        """Up to `size` bytes from `offset`."""
        return os.pread(self.descriptor, size, offset)

    def map(self, offset: int, size: int) -> Tensor:
        """`size` > 0 bytes from `offset` as uint8, mapped privately: gone from memory when the tensor is."""
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self.descriptor, offset - start + size, access=mmap.ACCESS_COPY, offset=start)
        os.posix_fadvise(self.descriptor, start, offset - start + size, os.POSIX_FADV_WILLNEED)
        return torch.frombuffer(mapped, dtype=torch.uint8, offset=offset - start, count=size)

    def check_unchanged(self) -> None:
        """Raise DataError when the file was written to since it was opened."""
        if self._state() != (self.size_bytes, self._changed_ns):
            raise DataError(f"{self.path} was changed while it was read; run the command again when it is at rest")

    def _state(self) -> tuple[int, int]:
        state = os.fstat(self.descriptor)
        return state.st_size, state.st_mtime_ns


@dataclass(frozen=True)
class Span:
    """A tensor's values in an open file, at `offset` bytes; `stride` None for row-major ones."""

    file: OpenFile
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None

    @property
    def header(self) -> Tensor:
        """Shape and dtype, as a meta tensor."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @property
    def scratch_bytes(self) -> int:
        """None: the values are the kernel's file cache, which it takes back when it must."""
        return 0

    @property
    def size_bytes(self) -> int:
        """Bytes in the file from the first to the last entry."""
        if 0 in self.shape:
            return 0
        if self.stride is None:
            return torch.Size(self.shape).numel() * self.dtype.itemsize
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The values, mapped; a copy only where the file did not align them."""
        if not self.size_bytes:
            return torch.empty(self.shape, dtype=self.dtype)
        raw = self.file.map(self.offset, self.size_bytes)
        if self.offset % self.dtype.itemsize:
            raw = raw.clone()
        flat = raw.view(self.dtype)
        return flat.view(self.shape) if self.stride is None else flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A tensor that could only be had by reading its whole file."""

    value: Tensor

    @property
    def header(self) -> Tensor:
        """Shape and dtype, as a meta tensor."""
        return torch.empty_like(self.value, device="meta")

    @property
    def scratch_bytes(self) -> int:
        """Its own size, for as long as the file is open."""
        return self.value.numel() * self.value.element_size()

    def read(self) -> Tensor:
        """The value itself, as a copy."""
        return self.value.clone()


@dataclass(frozen=True)
class TensorFile:
    """What one weights file holds: a source a name, in the order of the file, and its own notes (safetensors)."""

    file: OpenFile
    sources: Mapping[str, Source]
    metadata: Mapping[str, str]
