"""What every kind of source can do."""

from abc import abstractmethod
from collections.abc import Iterator

from pydantic import Field

from pipeline.config import Spec
from pipeline.data.items import Block, Item, Reject


class Source(Spec):
    """A task's images. Caps draw equally from each class; without caps every image is taken."""

    max_train: int | None = Field(default=None, ge=1)
    max_test: int | None = Field(default=None, ge=1)
    draw_seed: int = 0

    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """The task's class names, in the order of its local class numbers; ConfigError when there are none."""

    @abstractmethod
    def blocks(self, rows: int) -> list[Block]:
        """What there is to read, at most `rows` images a block where the source can be read in parts.

        Cheap: no image is opened. Raises ConfigError for what is missing or empty, DataError for what is unreadable.
        """

    def size_bytes(self) -> float | None:
        """Bytes of all encoded images at most; None where only reading them would tell."""
        return None

    @abstractmethod
    def read(self, block: Block) -> Iterator[tuple[Item, bytes | Reject]]:
        """Every image of `block`, encoded, in a fixed order; a Reject for one that can no longer be read."""
