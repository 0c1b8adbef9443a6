"""Checkpoints with NaN or infinities, when they are allowed: such an entry counts as one the expert never changed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.formats.lazy import LazyState
from pipeline.formats.spans import Source


@dataclass(frozen=True)
class Mended:
    """A tensor whose entries that are not finite, in it or in the base, take the base's value, or 0 if that is neither.

    `counts[title, name]` is set to the number of its own entries that were not finite.
    """

    source: Source
    base: Source | None
    title: str
    name: str
    counts: dict[tuple[str, str], int] = field(repr=False)

    @property
    def header(self) -> Tensor:
        """Shape and dtype, as a meta tensor."""
        return self.source.header

    @property
    def scratch_bytes(self) -> int:
        """The mended copy, the base's and a mask."""
        header = self.header
        return 3 * header.numel() * header.element_size() + self.source.scratch_bytes

    def read(self) -> Tensor:
        """The values, all finite."""
        value = self.source.read()
        if not value.is_floating_point():
            return value
        broken = ~torch.isfinite(value)
        if count := int(broken.sum()):
            self.counts[self.title, self.name] = count
        if self.base is None:
            return torch.where(broken, torch.zeros_like(value), value)
        origin = self.base.read()
        broken |= ~torch.isfinite(origin)
        origin = torch.where(torch.isfinite(origin), origin, torch.zeros_like(origin))
        return torch.where(broken, origin, value)


def mended(state: LazyState, base: LazyState | None, title: str, counts: dict[tuple[str, str], int]) -> LazyState:
    """`state` with every tensor mended against `base`, None for the base itself."""
    return LazyState(
        {
            name: Mended(source, base.sources[name] if base is not None else None, title, name, counts)
            for name, source in state.sources.items()
        }
    )


def restored(merged: Tensor, origin: Tensor) -> Tensor:
    """`merged` with the base's own value wherever that is not finite."""
    return torch.where(torch.isfinite(origin), merged, origin)
