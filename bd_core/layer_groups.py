"""Layer groups: which parameters share one routing weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["LayerGroups", "layer_groups"]

# Last stages of a tower, by the names that open_clip, timm, Hugging Face and torchvision give them. Needed because
# state dicts list a module's own parameters first: open_clip's `proj` stands before its blocks.
HEAD_PARTS = frozenset(
    {
        *("proj", "text_projection", "visual_projection", "logit_scale", "logit_bias"),
        *("ln_post", "ln_final", "norm", "fc_norm", "post_layernorm"),
        *("head", "fc", "classifier", "attnpool", "attn_pool"),
    }
)


@dataclass(frozen=True)
class LayerGroups:
    """Group index of every parameter (`index`) and the title of every group, in the order a sample passes them."""

    index: dict[str, int]
    titles: tuple[str, ...]

    @property
    def n_groups(self) -> int:
        """G."""
        return len(self.titles)


def layer_groups(names: Iterable[str]) -> LayerGroups:
    """Groups of a state dict's names: per tower `stem`, one group a block, `head` (ours; the paper says "layer").

    A name's prefix up to its first integer component is its block (`transformer.resblocks.3`). Names without one go
    to `head` or `stem` by their first part (known head names; anything that embeds is stem), and otherwise by whether
    they follow the tower's last block. A tower is a top-level prefix that holds blocks and other names (`visual`);
    its path enters the titles when there is more than one, as a block's path does when blocks stand in several rows
    (ResNet stages).
    """
    ordered = list(names)
    block_of = {name: block for name in ordered if (block := _block(name)) is not None}
    rows = list(dict.fromkeys(block[:-1] for block in block_of.values()))
    tops_beside = {name.split(".")[0] for name in ordered if name not in block_of and "." in name}
    towers = list(dict.fromkeys(_tower(name, block_of, tops_beside) for name in ordered))
    last_block = {_tower(name, block_of, tops_beside): i for i, name in enumerate(ordered) if name in block_of}

    title_of: dict[tuple[int, int, int], str] = {}
    key_of: dict[str, tuple[int, int, int]] = {}
    for position, name in enumerate(ordered):
        tower = _tower(name, block_of, tops_beside)
        rank = towers.index(tower)
        block = block_of.get(name)
        if block is not None:
            key = (rank, 1 + rows.index(block[:-1]), int(block[-1]))
            title = f"block {block[-1]}" if len(rows) == 1 else ".".join(block)
        else:
            is_head = _is_head(name.removeprefix(f"{tower}."), position > last_block.get(tower, len(ordered)))
            key = (rank, 1 + len(rows), 0) if is_head else (rank, 0, 0)
            title = " ".join(part for part in (tower if len(towers) > 1 else "", "head" if is_head else "stem") if part)
        key_of[name], title_of[key] = key, title
    order = {key: i for i, key in enumerate(sorted(title_of))}
    return LayerGroups({name: order[key] for name, key in key_of.items()}, tuple(title_of[key] for key in order))


def _block(name: str) -> tuple[str, ...] | None:
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    return None if first is None else tuple(parts[: first + 1])


def _is_head(name: str, follows_blocks: bool) -> bool:
    first = name.split(".")[0]
    return first in HEAD_PARTS or (follows_blocks and "embed" not in first)


def _tower(name: str, block_of: dict[str, tuple[str, ...]], tops_beside: set[str]) -> str:
    top = name.split(".")[0]
    return top if top in tops_beside and any(len(b) > 2 and b[0] == top for b in block_of.values()) else ""
