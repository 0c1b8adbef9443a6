"""Where a merge is written: hidden beside its place, verified, and put there by one rename."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.errors import ConfigError, DataError
from pipeline.formats.lazy import HF_INDEXES, Checkpoint, open_file
from pipeline.formats.safetensors_files import SafetensorsWriter, tensor_bytes
from pipeline.formats.spans import Span
from pipeline.merge.hashing import BLOCK_BYTES, hash_range
from pipeline.merge.memory import TORCH_SUFFIXES
from pipeline.merge.spec import human
from pipeline.store.commit import flush

MANIFEST_SUFFIX = ".json"
SMALL_BYTES = 64 << 20  # configuration, tokenizer and the like that a model's folder has beside its weights
WAITING = 2  # tensors on their way to the disk
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")


class Output:
    """The files of one merged model, in the base's own names, under a hidden name until `commit`.

    `open` makes them; `write` takes tensors in any order and returns at once, a thread hashes and writes them; `close`
    without `commit` removes all of it.
    """

    def __init__(self, target: Path, base: Checkpoint, metadata: Mapping[str, str]) -> None:
        self.target = target
        self._base = base
        self._folder = not target.suffix
        token = uuid.uuid4().hex[:8]
        self._hidden = target.with_name(f".{target.stem}.{token}.partial{target.suffix}")
        self._headers = {name: source.header for name, source in base.sources.items()}
        self._state: dict[str, Tensor] = {}  # of torch's format, which is written whole
        self._digests: dict[Path, dict[str, str]] = {}
        self._writers: dict[str, SafetensorsWriter] = {}
        self._pool = ThreadPoolExecutor(1, "write")
        self._waiting: list[Future[None]] = []
        self._committed = False
        self._metadata = metadata

    def open(self) -> None:
        """Make the hidden files, with room for all values."""
        try:
            self._create(self._metadata)
        except OSError as error:
            raise ConfigError(
                f"output {self.target} cannot be written ({error.strerror or error}); choose another"
            ) from None

    def close(self) -> None:
        """End the writing; what is not committed is removed. To be called whatever happened since the constructor."""
        self._pool.shutdown(cancel_futures=True)
        for writer in self._writers.values():
            writer.close()
        _remove(self._hidden.with_suffix(".manifest"))
        if not self._committed:
            _remove(self._hidden)

    def write(self, name: str, value: Tensor) -> None:
        """One tensor under the base file's own name."""
        while len(self._waiting) >= WAITING:
            self._waiting.pop(0).result()
        self._waiting.append(self._pool.submit(self._write, name, value))

    def finish(self) -> list[dict[str, object]]:
        """Everything on the disk and verified: each file's final path, bytes and sha256."""
        while self._waiting:
            self._waiting.pop(0).result()
        if self.target.suffix in TORCH_SUFFIXES:
            digests = {name: hashlib.sha256(tensor_bytes(value)).hexdigest() for name, value in self._state.items()}
            with self._hidden.open("xb") as file:
                torch.save({name: self._state[name] for name in self._headers}, file)
                file.flush()
                os.fsync(file.fileno())
            self._digests = {self._hidden: digests}
        for writer in {id(each): each for each in self._writers.values()}.values():
            writer.finish()
            self._digests[writer.path] = writer.digests
        files = []
        for path, digests in self._digests.items():
            headers = {name: self._headers[name] for name in digests}
            final = self.target / path.name if self._folder else self.target
            files.append({"path": str(final), "bytes": path.stat().st_size, "sha256": verify(path, headers, digests)})
        if self._folder:
            flush(self._hidden)
        return files

    def commit(self, manifest: str) -> Path:
        """Put the output into its place by one rename, then the manifest beside it; return the manifest's path."""
        beside = self.target.with_name(self.target.name + MANIFEST_SUFFIX)
        hidden = self._hidden.with_suffix(".manifest")
        hidden.write_text(manifest, encoding="utf-8")
        flush(hidden)
        replaced = None
        beside.unlink(missing_ok=True)  # a model without a manifest, never one with another's
        if self._folder and self.target.is_dir():
            replaced = self._hidden.with_suffix(".replaced")
            self.target.rename(replaced)
        self._hidden.replace(self.target)
        self._committed = True
        hidden.replace(beside)
        if replaced is not None:
            _remove(replaced)
        flush(self.target.parent)
        return beside

    def _create(self, metadata: Mapping[str, str]) -> None:
        if self.target.suffix in TORCH_SUFFIXES:
            self._hidden.open("xb").close()  # fails here if anywhere
            self._hidden.unlink()
            return
        if not self._folder:
            self._writers = dict.fromkeys(self._headers, SafetensorsWriter(self._hidden, self._headers, metadata))
            return
        self._hidden.mkdir()
        sharded = len(self._base.files) > 1 and all(f.file.path.suffix == ".safetensors" for f in self._base.files)
        for file in self._base.files if sharded else self._base.files[:1]:
            names = file.sources if sharded else self._headers
            own = file.file.path.name
            path = self._hidden / (own if own.endswith(".safetensors") else "model.safetensors")
            writer = SafetensorsWriter(path, {name: self._headers[name] for name in names}, metadata)
            self._writers |= dict.fromkeys(names, writer)
        _copy_small(self._base.files[0].file.path.parent, self._hidden, with_index=sharded)

    def _write(self, name: str, value: Tensor) -> None:
        if self._writers:
            self._writers[name].write(name, value)
        else:
            self._state[name] = value.detach().clone()


def check_target(target: Path, base: Checkpoint, inputs: set[Path], *, force: bool) -> None:
    """Raise ConfigError when the output cannot be put there: in use, no folder, no room, no format."""
    folder = not target.suffix
    if target.resolve() in inputs or any(target.resolve() in path.parents for path in inputs):
        raise ConfigError(f"output {target} is one of the inputs, which are never written to; name another place")
    if target.suffix not in ("", ".safetensors", *TORCH_SUFFIXES):
        raise ConfigError(
            f"output {target}: {target.suffix} is not written; name a .safetensors or .pt file, or a folder"
        )
    if folder and not base.path.is_dir():
        raise ConfigError(
            f"output {target} has no suffix, and base {base.path} is no folder to lay it out as; name a file"
        )
    if not target.parent.is_dir():
        raise ConfigError(f"output {target}: folder {target.parent} does not exist; make it, or correct the path")
    if target.exists() and not force:
        raise ConfigError(f"output {target} exists; name another, or replace it with --force")
    if target.exists() and target.is_dir() != folder:
        raise ConfigError(
            f"output {target} is a {'file' if folder else 'folder'}, not replaced by the other; name another"
        )
    needed = sum(source.header.numel() * source.header.element_size() for source in base.sources.values())
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ConfigError(f"output {target} needs {human(needed)}; {target.parent} has {human(free)} free; make room")


def verify(path: Path, headers: Mapping[str, Tensor], digests: Mapping[str, str]) -> str:
    """The file's sha256, once it was read back and holds these tensors by name, shape, dtype and sha256 of values.

    Raises DataError when the disk gives back anything else.
    """
    file = open_file(path)
    found = {name: source.header for name, source in file.sources.items()}
    described = {name: (value.shape, value.dtype) for name, value in headers.items()}
    if {name: (value.shape, value.dtype) for name, value in found.items()} != described:
        raise DataError(f"{path}: holds other tensors than were written; check the disk and merge again")
    if file.metadata:
        with safe_open(path, framework="pt") as reference:  # the format's own reader takes it too
            assert set(reference.keys()) == set(headers)
    whole = hashlib.sha256()

    def hash_whole() -> None:
        for start in range(0, file.file.size_bytes, BLOCK_BYTES):
            hash_range(file.file.descriptor, start, min(BLOCK_BYTES, file.file.size_bytes - start), whole)

    thread = threading.Thread(target=hash_whole, daemon=True)
    thread.start()
    wrong = [name for name, source in file.sources.items() if _digest(source) != digests[name]]
    thread.join()
    if wrong:
        raise DataError(
            f"{path}: {len(wrong)} tensors read back differently from what was written, first {wrong[0]}; nothing was "
            "put in place: check the disk and merge again"
        )
    return whole.hexdigest()


def _digest(source: object) -> str:
    assert isinstance(source, Span)
    if source.stride is None and source.size_bytes:
        found = hashlib.sha256()
        for start in range(0, source.size_bytes, BLOCK_BYTES):
            hash_range(
                source.file.descriptor, source.offset + start, min(BLOCK_BYTES, source.size_bytes - start), found
            )
        return found.hexdigest()
    return hashlib.sha256(tensor_bytes(source.read())).hexdigest()


def _copy_small(source: Path, target: Path, *, with_index: bool) -> None:
    """What a model's folder has beside its weights: configuration, tokenizer, preprocessing."""
    for path in sorted(source.iterdir()):
        is_index = path.name in HF_INDEXES
        wanted = path.is_file() and path.stat().st_size <= SMALL_BYTES and not path.name.startswith(".")
        if wanted and (with_index if is_index else not path.name.endswith(_WEIGHTS)):
            shutil.copyfile(path, target / path.name)


def _remove(path: Path) -> None:
    remove: Callable[[Path], None] = shutil.rmtree if path.is_dir() else lambda each: each.unlink(missing_ok=True)
    remove(path)
