"""A folder of images: `<class>/*` or flat, with `train/` and `test/` above it or split by hash."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline.config import UserPath
from pipeline.data.items import SPLITS, Block, Item, Reject, Split, draw_splits, listed_blocks, split_by_hash
from pipeline.data.source import Source
from pipeline.errors import ConfigError


class FolderSource(Source):
    """Images below `path`. Class folders name the classes; a flat folder is unlabelled and needs `class_names`.

    Where `path` holds the folders named `train_folder` and `test_folder`, they are the splits and whatever lies beside
    them is left alone; otherwise `test_fraction` of the images, chosen by a hash of their paths, is the test split.
    Hidden files are skipped; any other file is an image or will be a reject.
    """

    kind: Literal["folder"] = "folder"
    path: UserPath
    train_folder: str = "train"
    test_folder: str = "test"
    test_fraction: float = Field(default=0.2, ge=0.0, le=1.0)
    class_names: tuple[str, ...] = ()

    def classes(self) -> tuple[str, ...]:
        """`class_names` where given, otherwise the names of the class folders of all splits, sorted."""
        found = {folder.name for root in self._roots().values() for folder in _subfolders(root)}
        if not self.class_names and not found:
            raise ConfigError(
                f"folder {self.path} has no class folders, so its classes have no names; put the images in one folder "
                "a class, or list class_names in the configuration"
            )
        extra = sorted(found - set(self.class_names))
        if self.class_names and extra:
            raise ConfigError(
                f"folder {self.path} has class folders {extra} that class_names does not list; add them there, or move "
                "them away"
            )
        return self.class_names or tuple(sorted(found))

    def blocks(self, rows: int) -> list[Block]:
        """Blocks in the order of the paths. A file counts as changed when its size or its time of change differ."""
        self.classes()
        items = [item for split, root in self._roots().items() for item in self._items(root, split)]
        if not items:
            raise ConfigError(f"folder {self.path} holds no images; correct the path or put images there")
        items.sort(key=lambda item: item.reference)
        return listed_blocks("folder", draw_splits(items, self.max_train, self.max_test, self.draw_seed), rows)

    def read(self, block: Block) -> Iterator[tuple[Item, bytes | Reject]]:
        """The files' own bytes."""
        for item in block.items:
            try:
                yield item, (self.path / item.reference).read_bytes()
            except OSError as error:
                yield item, Reject(f"cannot be read: {error.strerror}")

    def size_bytes(self) -> float | None:
        """Bytes of all files, those that a cap leaves out too."""
        return float(sum(file.stat().st_size for root in self._roots().values() for file in _files_below(root)))

    def _roots(self) -> dict[Split | None, Path]:
        """{split: its folder}, or {None: path} where the split is made by hash."""
        if not self.path.is_dir():
            state = "is not a folder" if self.path.exists() else "does not exist"
            raise ConfigError(f"folder {self.path} {state}; correct the path")
        folders = {
            split: self.path / name for split, name in zip(SPLITS, (self.train_folder, self.test_folder), strict=True)
        }
        there = [split for split, folder in folders.items() if folder.is_dir()]
        if not there:
            return {None: self.path}
        if len(there) == 1:
            missing = next(folder for split, folder in folders.items() if split not in there)
            raise ConfigError(
                f"folder {self.path} has {folders[there[0]].name}/ but no {missing.name}/; add it, or set "
                "train_folder and test_folder to the names you use"
            )
        return {split: folders[split] for split in SPLITS}

    def _items(self, root: Path, split: Split | None) -> Iterator[Item]:
        labelled = _subfolders(root)
        loose = [file for file in _files_of(root) if labelled]
        if loose:
            raise ConfigError(
                f"folder {root}: {len(loose)} files such as {loose[0].name} lie beside the class folders "
                f"{[folder.name for folder in labelled[:3]]}; move them into one"
            )
        for folder in labelled or [root]:
            for file in _files_below(folder):
                reference = file.relative_to(self.path).as_posix()
                state = file.stat()
                yield Item(
                    reference,
                    split or split_by_hash(reference, self.test_fraction),
                    folder.name if labelled else None,
                    f"{state.st_size}-{state.st_mtime_ns}",
                )


def _subfolders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_file() and not path.name.startswith("."))


def _files_below(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))
