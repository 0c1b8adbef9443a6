"""What a source lists: items, the blocks they are read in, and the two seeded choices (split and cap)."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True)
class Item:
    """One image of a source. `fingerprint` changes when its bytes may have changed; labels are class names."""

    reference: str
    split: Split
    label: str | None
    fingerprint: str = ""


@dataclass(frozen=True)
class Reject:
    """An image that cannot be used, and why."""

    reason: str


@dataclass(frozen=True)
class Block:
    """What is read in one go: images of one split. `settings` pin the content and are hashed, `items` are not.

    A package's block has no items before it is read: its content is pinned by the packages' versions.
    """

    id: str
    split: Split
    settings: dict[str, Any]
    items: tuple[Item, ...] = ()


def hash_share(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` alone: the same on every machine, in every order of calls."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_hash(reference: str, test_fraction: float) -> Split:
    """`test` for about `test_fraction` of all references; adding images never moves another to the other side."""
    return "test" if hash_share("split", reference) < test_fraction else "train"


ItemT = TypeVar("ItemT", bound=Item)


def draw(items: Sequence[ItemT], cap: int | None, seed: int) -> list[ItemT]:
    """At most `cap` of `items`, drawn with `seed`, equally from each class as far as it reaches; the order is kept."""
    if cap is None or len(items) <= cap:
        return list(items)
    by_class: dict[str | None, list[tuple[float, int]]] = {}
    for position, item in enumerate(items):
        by_class.setdefault(item.label, []).append((hash_share("draw", seed, item.reference), position))
    # Round robin: the first drawn of every class, then the second of every class, ...
    turns = [
        (turn, share, position) for drawn in by_class.values() for turn, (share, position) in enumerate(sorted(drawn))
    ]
    chosen = sorted(position for _, _, position in sorted(turns)[:cap])
    return [items[position] for position in chosen]


def draw_splits(items: Iterable[ItemT], max_train: int | None, max_test: int | None, seed: int) -> list[ItemT]:
    """`draw` for both splits, train first."""
    listed = list(items)
    train, test = ([item for item in listed if item.split == split] for split in SPLITS)
    return draw(train, max_train, seed) + draw(test, max_test, seed)


def listed_blocks(kind: str, items: Sequence[Item], rows: int) -> list[Block]:
    """Blocks of at most `rows` items of one split, in the order given, each pinned by a digest of its items."""
    blocks = []
    for split in SPLITS:
        own = [item for item in items if item.split == split]
        for number, start in enumerate(range(0, len(own), rows)):
            part = tuple(own[start : start + rows])
            digest = hashlib.sha256()
            for item in part:
                digest.update(f"{item.reference}\0{item.split}\0{item.label!r}\0{item.fingerprint}\n".encode())
            settings = {"source": kind, "split": split, "rows": len(part), "items_sha256": digest.hexdigest()}
            blocks.append(Block(f"{split}-{number:05d}", split, settings, part))
    return blocks
