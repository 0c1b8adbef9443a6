"""State dicts that stay on disk: a tensor is read when it is asked for and nothing but the last one is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from pipeline.errors import ConfigError, DataError
from pipeline.formats.clip_names import Part, open_clip_parts, unwrapped
from pipeline.formats.safetensors_files import open_safetensors
from pipeline.formats.spans import OpenFile, Source, TensorFile
from pipeline.formats.torch_files import open_torch

HF_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
HF_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_INDEX_SUFFIX = ".index.json"
_WRAPPERS = ("module.", "_orig_mod.")


class LazyState(Mapping[str, Tensor]):
    """A state dict that reads `state[name]` from its file. The last tensor read is kept, for whoever asks twice."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self.sources = sources
        self._last: tuple[str, Tensor] | None = None

    @cached_property
    def header(self) -> dict[str, Tensor]:
        """Names, shapes and dtypes as meta tensors, without reading."""
        return {name: source.header for name, source in self.sources.items()}

    def only(self, names: Sequence[str]) -> LazyState:
        """The same state with these names alone."""
        return LazyState({name: self.sources[name] for name in names})

    def __getitem__(self, name: str) -> Tensor:
        last = self._last  # threads may read beside each other
        if last is None or last[0] != name:
            source = self.sources[name]
            last = self._last = None
            last = self._last = (name, source.read())
        return last[1]

    def __contains__(self, name: object) -> bool:
        return name in self.sources

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


@dataclass(frozen=True)
class Joined:
    """One tensor of ours made of several of a file, or of one that is stored transposed."""

    part: Part
    sources: tuple[Source, ...]

    @property
    def header(self) -> Tensor:
        """Shape and dtype, as a meta tensor."""
        return self.part.assemble([source.header for source in self.sources])

    @property
    def scratch_bytes(self) -> int:
        """A copy of its own."""
        header = self.header
        return header.numel() * header.element_size()

    def read(self) -> Tensor:
        """The values."""
        return self.part.assemble([source.read() for source in self.sources])


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk: its weights files, the file names' own `sources`, and how our names are made of them.

    `naming` says whose names the files use. `metadata` is that of a safetensors file.
    """

    path: Path
    files: tuple[TensorFile, ...]
    sources: Mapping[str, Source]
    parts: Mapping[str, Part]
    naming: str

    @cached_property
    def state(self) -> LazyState:
        """The lazy state dict under open_clip's names for a CLIP model, under its own for any other."""
        return LazyState({name: self._source(part) for name, part in self.parts.items()})

    @property
    def opened(self) -> tuple[OpenFile, ...]:
        """Its weights files."""
        return tuple(each.file for each in self.files)

    def _source(self, part: Part) -> Source:
        sources = tuple(self.sources[name] for name in part.sources)
        return sources[0] if len(sources) == 1 and not part.transposed else Joined(part, sources)


def open_checkpoint(path: Path) -> Checkpoint:
    """A model on disk by its headers: a weights file, an index of shards, or a folder that holds one of them.

    Raises ConfigError for paths where nothing is, DataError for files that cannot be used.
    """
    files = tuple(open_file(each) for each in weight_files(path))
    sources: dict[str, Source] = {}
    for each in files:
        twice = sources.keys() & each.sources.keys()
        if twice:
            raise DataError(f"{path}: {min(twice)} is in more than one of its shards; fetch it again")
        sources |= each.sources
    if not sources:
        raise DataError(f"{path}: holds no tensor; name a file of weights")
    parts = open_clip_parts(list(sources), str(path))
    if parts is None:
        own = unwrapped(list(sources), _WRAPPERS)
        return Checkpoint(path, files, sources, {name: Part((source,)) for name, source in own.items()}, "its own")
    hugging_face = any(len(part.sources) > 1 for part in parts.values())
    return Checkpoint(path, files, sources, parts, "Hugging Face CLIP" if hugging_face else "open_clip")


def open_file(path: Path) -> TensorFile:
    """One weights file, by its suffix."""
    return open_safetensors(path) if path.suffix == ".safetensors" else open_torch(path)


def weight_files(path: Path) -> list[Path]:
    """The files that hold a model's weights: `path` itself, or those of its index or folder, shards in order."""
    if path.name.endswith(_INDEX_SUFFIX) and path.is_file():
        return _shards(path)
    if not path.is_dir():
        return [path]
    for name in HF_INDEXES:
        if (path / name).is_file():
            return _shards(path / name)
    for name in HF_FILES:
        if (path / name).is_file():
            return [path / name]
    raise ConfigError(
        f"checkpoint folder {path} holds none of {', '.join((*HF_INDEXES, *HF_FILES))}; name a file of weights"
    )


def _shards(index: Path) -> list[Path]:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{index}: not an index of shards ({error!r}); fetch it again") from None
    escaping = [shard for shard in shards if Path(shard).name != shard]
    if escaping:
        raise DataError(f"{index}: shard {escaping[0]!r} lies outside the folder; fetch it again")
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise DataError(f"{index}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]}; fetch them")
    return [index.parent / shard for shard in shards]
