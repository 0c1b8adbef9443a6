"""Shards: webdataset reads them, equal samples give equal bytes, rows are reached at random."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.errors import DataError
from pipeline.formats.image_bank import ImageBank
from pipeline.formats.shards import ShardReader, ShardSample, ShardWriter, read_shard


def samples(count: int, first: int = 0) -> list[ShardSample]:
    return [
        ShardSample(f"{number:016x}", "png" if number % 2 else "jpg", bytes([number]) * (500 + number), {"task": "é"})
        for number in range(first, first + count)
    ]


def write(path: Path, content: list[ShardSample]) -> Path:
    with ShardWriter(path) as writer:
        for sample in content:
            writer.add(sample)
    return path


def test_what_was_written_is_read_in_order_and_at_random(tmp_path: Path) -> None:
    content = samples(7)
    path = write(tmp_path / "images.tar", content)
    assert list(read_shard(path)) == content
    with ShardReader(path) as reader:
        assert len(reader) == 7
        assert [reader.image(row) for row in (5, 0, 5)] == [content[5].image, content[0].image, content[5].image]
        assert reader.sample(3) == content[3]


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, samples(3)).read_bytes() for name in ("one.tar", "two.tar"))
    assert one == two
    with tarfile.open(tmp_path / "one.tar") as tar:
        members = tar.getmembers()
    assert {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in members} == {
        (0, 0, 0, "", 0o644)
    }


def test_webdataset_reads_a_shard(tmp_path: Path) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    content = samples(4)
    with write(tmp_path / "images.tar", content).open("rb") as stream:
        read = list(group_by_keys(tar_file_expander([{"url": "images.tar", "stream": stream}])))
    assert [sample["__key__"] for sample in read] == [sample.sample_id for sample in content]
    assert [sample[own.extension] for sample, own in zip(read, content, strict=True)] == [own.image for own in content]


def test_a_sample_may_occur_once_and_ids_have_no_dots(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "images.tar") as writer:
        writer.add(samples(1)[0])
        with pytest.raises(AssertionError, match="already in"):
            writer.add(samples(1)[0])
        with pytest.raises(AssertionError, match="first dot"):
            writer.add(ShardSample("a.b", "png", b"", {}))


@pytest.mark.parametrize("keep", [0, 100, 700, 1700])
def test_a_shard_cut_short_is_a_data_error(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "images.tar", samples(2))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"images\.tar.*run again"):
        list(read_shard(path))


def test_a_tar_of_something_else_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(tmp_path / "a.txt", "a.txt")
    with pytest.raises(DataError, match="not pairs"):
        list(read_shard(tmp_path / "other.tar"))


class CountingDecoder:
    """Turns the marker byte of a sample into a flat 2x2 image."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        self.calls += 1
        return np.full((2, 2, 3), data[0], dtype=np.uint8)


def test_image_bank_serves_rows_of_all_shards_within_its_budget(tmp_path: Path) -> None:
    shards = [write(tmp_path / "0.tar", samples(3)), write(tmp_path / "1.tar", samples(4, first=3))]
    decode = CountingDecoder()
    bank = ImageBank(shards, decode, budget_bytes=4 * 12)
    assert len(bank) == 7
    batch = bank.batch([6, 0, 3, 0])
    assert batch.dtype == torch.uint8 and batch.shape == (4, 2, 2, 3)
    assert batch[:, 0, 0, 0].tolist() == [6, 0, 3, 0]
    assert decode.calls == 3
    assert bank.batch(torch.tensor([3, 6, 0]))[:, 1, 1, 2].tolist() == [3, 6, 0] and decode.calls == 3
    for row in range(7):
        assert bank.batch(np.array([row]))[0, 0, 0, 0] == row
        assert bank.kept_bytes <= 4 * 12
    with pytest.raises(IndexError, match="row 7 of an image bank with 7 rows"):
        bank.batch([7])
    bank.close()


def test_image_bank_without_memory_still_serves(tmp_path: Path) -> None:
    bank = ImageBank([write(tmp_path / "0.tar", samples(3))], CountingDecoder(), budget_bytes=0)
    assert bank.batch([2, 2, 1])[:, 0, 0, 0].tolist() == [2, 2, 1]
    assert bank.kept_bytes == 0
    bank.close()
