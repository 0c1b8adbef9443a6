"""Image shards: tar files that webdataset reads, `<sample_id>.<ext>` with the original bytes beside `<sample_id>.json`.

Equal samples in equal order give equal bytes: fixed times, owners and modes, plain ustar headers.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from pipeline.errors import DataError


@dataclass(frozen=True)
class ShardSample:
    """One sample of a shard: the encoded image as it came, and what was noted with it."""

    sample_id: str
    extension: str
    image: bytes
    meta: dict[str, Any]


class ShardWriter:
    """Writes samples one by one; the caller gives them in a fixed order. A sample id may occur once."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115  closed by __exit__
        self._seen: set[str] = set()

    def add(self, sample: ShardSample) -> None:
        """Append a sample: image first, its JSON next to it."""
        assert sample.sample_id not in self._seen, f"sample {sample.sample_id} is already in {self._tar.name!r}"
        assert "." not in sample.sample_id, f"sample id {sample.sample_id!r}: webdataset's key ends at the first dot"
        self._seen.add(sample.sample_id)
        meta = json.dumps(sample.meta, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
        self._add_file(f"{sample.sample_id}.{sample.extension}", sample.image)
        self._add_file(f"{sample.sample_id}.json", meta)

    def _add_file(self, name: str, data: bytes) -> None:
        header = tarfile.TarInfo(name)  # mtime, uid and gid are 0, the owner's name is empty
        header.size, header.mode = len(data), 0o644
        self._tar.addfile(header, io.BytesIO(data))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()


def read_shard(path: Path) -> Iterator[ShardSample]:
    """Every sample, in the order it was written; DataError for a shard that is cut short or not ours."""
    with ShardReader(path) as reader:
        for row in range(len(reader)):
            yield reader.sample(row)


class ShardReader:
    """Random access by row. The headers are walked once; images are read when asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._members = _members(path)
            self._file: BinaryIO = path.open("rb")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"shard {path} cannot be read ({error}); remove its unit and run again") from None

    def __len__(self) -> int:
        return len(self._members)

    def image(self, row: int) -> bytes:
        """The encoded image of a row."""
        return self._bytes(self._members[row][0])

    def sample(self, row: int) -> ShardSample:
        """Everything of a row."""
        image, meta = self._members[row]
        sample_id, _, extension = image.name.partition(".")
        return ShardSample(sample_id, extension, self._bytes(image), json.loads(self._bytes(meta)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _bytes(self, member: tarfile.TarInfo) -> bytes:
        self._file.seek(member.offset_data)
        data = self._file.read(member.size)
        if len(data) != member.size:
            raise DataError(f"shard {self._path} ends within {member.name}; remove its unit and run again")
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _members(path: Path) -> list[tuple[tarfile.TarInfo, tarfile.TarInfo]]:
    """(image, json) of every sample."""
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
    pairs = list(zip(members[::2], members[1::2], strict=False))
    whole = len(members) % 2 == 0 and all(meta.name == f"{image.name.partition('.')[0]}.json" for image, meta in pairs)
    if not whole:
        raise tarfile.ReadError("its members are not pairs of an image and its .json")
    return pairs
