"""The radius and the way to search with it: what the `radius` stage decided, as every later stage reads it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

from pipeline.errors import DataError
from pipeline.neighbourhoods.planner import Backend

RADIUS, QUANTIZER = "radius.json", "quantizer.faiss"


@dataclass(frozen=True)
class Radius:
    """A decision and nothing measured: equal decisions are equal bytes, whatever sample led to them."""

    mode: Literal["global", "adaptive"]
    min_cosine: float  # with `adaptive` the median over the sample, for the reader
    target_degree: int
    backend: Backend
    n_lists: int
    n_probes: int
    edge_share: float = 0.0  # ivf: the share of all pairs of the sample that are edges; what a join is measured by

    def write(self, directory: Path) -> None:
        """Write `radius.json`."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"
        (directory / RADIUS).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Self:
        """What lies in `directory`; `DataError` when it is no such file."""
        try:
            return cls(**json.loads((directory / RADIUS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{directory / RADIUS} cannot be read ({error}); remove its unit and run again") from None
