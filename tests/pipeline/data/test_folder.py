"""Folders of images: layouts, splits, caps, changes, and what a user may get wrong."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import Spec, parse
from pipeline.data.folder import FolderSource
from pipeline.data.images import encode_png
from pipeline.data.items import Block, Item, Reject
from pipeline.data.sources import AnySource
from pipeline.errors import ConfigError


def put(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(np.full((4, 4, 3), value % 256, dtype=np.uint8)))


def read_all(source: FolderSource, rows: int = 100) -> list[tuple[Item, bytes | Reject]]:
    return [pair for block in source.blocks(rows) for pair in source.read(block)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, count in (("cat", 30), ("dog", 20)):
        for number in range(count):
            put(tmp_path / name / f"{number:03d}.png", number)
    return tmp_path


def test_class_folders_name_the_classes_and_files_keep_their_bytes(folder: Path) -> None:
    (folder / ".DS_Store").write_bytes(b"hidden")
    (folder / "cat" / "more").mkdir()
    put(folder / "cat" / "more" / "deep.png", 77)
    source = FolderSource(path=folder)
    assert source.classes() == ("cat", "dog")
    pairs = read_all(source)
    assert len(pairs) == 51
    assert Counter(item.label for item, _ in pairs) == {"cat": 31, "dog": 20}
    for item, data in pairs:
        assert data == (folder / item.reference).read_bytes()
        assert item.reference.startswith(f"{item.label}/")
    assert 0 < sum(item.split == "test" for item, _ in pairs) < 25


def test_split_by_hash_does_not_move_when_images_are_added(folder: Path) -> None:
    before = {item.reference: item.split for item, _ in read_all(FolderSource(path=folder))}
    for number in range(100, 150):
        put(folder / "cat" / f"{number}.png", number)
    after = {item.reference: item.split for item, _ in read_all(FolderSource(path=folder))}
    assert before.items() <= after.items()
    assert {item.split for item, _ in read_all(FolderSource(path=folder, test_fraction=0.0))} == {"train"}


def test_train_and_test_folders_are_the_splits(tmp_path: Path) -> None:
    for split, value in (("train", 1), ("test", 2), ("val", 3)):
        put(tmp_path / split / "cat" / "a.png", value)
        put(tmp_path / split / "dog" / "a.png", value + 10)
    pairs = read_all(FolderSource(path=tmp_path))
    assert [(item.reference, item.split, item.label) for item, _ in pairs] == [
        ("train/cat/a.png", "train", "cat"),
        ("train/dog/a.png", "train", "dog"),
        ("test/cat/a.png", "test", "cat"),
        ("test/dog/a.png", "test", "dog"),
    ]
    renamed = read_all(FolderSource(path=tmp_path, test_folder="val"))
    assert renamed[2][0].reference == "val/cat/a.png" and renamed[2][0].split == "test"


def test_flat_folder_is_unlabelled_and_needs_class_names(tmp_path: Path) -> None:
    for number in range(10):
        put(tmp_path / f"{number}.png", number)
    with pytest.raises(ConfigError, match=r"no class folders.*list class_names"):
        FolderSource(path=tmp_path).blocks(10)
    source = FolderSource(path=tmp_path, class_names=("cat", "dog"))
    assert source.classes() == ("cat", "dog")
    assert {item.label for item, _ in read_all(source)} == {None}


def test_blocks_are_pinned_by_what_they_hold(folder: Path) -> None:
    source = FolderSource(path=folder)
    blocks = source.blocks(15)
    assert [block.id for block in blocks[:2]] == ["train-00000", "train-00001"]
    assert {block.split for block in blocks} == {"train", "test"}
    assert all(len(block.items) <= 15 and {item.split for item in block.items} == {block.split} for block in blocks)
    assert source.blocks(15) == blocks
    changed = blocks[-1].items[-1]
    os.utime(folder / changed.reference, ns=(1, 1))
    again = source.blocks(15)
    assert again[:-1] == blocks[:-1]
    assert again[-1].settings != blocks[-1].settings


def test_caps_draw_equally_from_each_class_and_by_seed(folder: Path) -> None:
    def drawn(seed: int) -> list[str]:
        source = FolderSource(path=folder, max_train=12, max_test=4, draw_seed=seed)
        items = [item for item, _ in read_all(source)]
        assert Counter(item.label for item in items if item.split == "train") == {"cat": 6, "dog": 6}
        assert sum(item.split == "test" for item in items) == 4
        return [item.reference for item in items]

    assert drawn(0) == drawn(0) != drawn(1)
    everything = {item.reference for item, _ in read_all(FolderSource(path=folder, max_train=1000))}
    assert len(everything) == 50 and set(drawn(0)) < everything


def test_a_file_that_vanished_is_a_reject(folder: Path) -> None:
    source = FolderSource(path=folder)
    (block, *_) = source.blocks(100)
    (folder / block.items[0].reference).unlink()
    pairs = list(source.read(block))
    assert pairs[0][1] == Reject("cannot be read: No such file or directory")
    assert len(pairs) == len(block.items)


def test_what_a_user_may_get_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere does not exist; correct the path"):
        FolderSource(path=tmp_path / "nowhere").blocks(10)
    with pytest.raises(ConfigError, match="no class folders"):
        FolderSource(path=tmp_path).blocks(10)
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"empty holds no images"):
        FolderSource(path=tmp_path / "empty").blocks(10)
    put(tmp_path / "empty" / "loose.png")
    with pytest.raises(ConfigError, match=r"1 files such as loose\.png lie beside the class folders \['cat'\]"):
        FolderSource(path=tmp_path / "empty").blocks(10)
    put(tmp_path / "half" / "train" / "cat" / "a.png")
    with pytest.raises(ConfigError, match=r"has train/ but no test/"):
        FolderSource(path=tmp_path / "half").blocks(10)
    put(tmp_path / "named" / "bird" / "a.png")
    with pytest.raises(ConfigError, match=r"class folders \['bird'\] that class_names does not list"):
        FolderSource(path=tmp_path / "named", class_names=("cat",)).blocks(10)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is not a folder"):
        FolderSource(path=tmp_path / "file").blocks(10)


class Holder(Spec):
    source: AnySource


def test_sources_are_told_apart_by_kind() -> None:
    held = parse(Holder, {"source": {"kind": "folder", "path": "images"}}, "demo.yaml")
    assert isinstance(held.source, FolderSource)
    with pytest.raises(ConfigError, match="kind"):
        parse(Holder, {"source": {"kind": "webcam"}}, "demo.yaml")
    with pytest.raises(ConfigError, match="max_trian"):
        parse(Holder, {"source": {"kind": "folder", "path": "images", "max_trian": 3}}, "demo.yaml")


def test_a_block_of_nothing_reads_nothing(folder: Path) -> None:
    assert list(FolderSource(path=folder).read(Block("train-00000", "train", {}))) == []
