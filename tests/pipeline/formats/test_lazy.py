"""State dicts that stay on disk, read by several threads."""

import torch

from pipeline.formats.lazy import LazyState
from pipeline.formats.spans import Loaded


def test_a_reader_that_another_comes_between_gets_what_it_asked_for() -> None:
    state = LazyState({name: Loaded(torch.tensor(value)) for name, value in (("a", 1.0), ("b", 2.0))})

    class Interrupted(str):
        """While the state looks whether it holds this name, somebody else reads another."""

        __slots__ = ()
        __hash__ = str.__hash__

        def __ne__(self, other: object) -> bool:
            assert state["b"].item() == 2.0
            return str.__ne__(self, other)

    assert state["a"].item() == 1.0
    assert state[Interrupted("a")].item() == 1.0
