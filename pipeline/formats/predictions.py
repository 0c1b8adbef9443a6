"""What a called model says of a user's images, one row an image: as a Parquet table, or as JSON lines."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.formats.tables import field, write_table

STANDARD_OUTPUT = Path("-")
SUFFIXES = (".parquet", ".jsonl")
WEIGHT = "weight_"  # then the expert's name: one column each


@dataclass(frozen=True)
class Prediction:
    """What is said of one image: a class with its probability, or why there is none (`reject`).

    `uncertainty` is u of the evidential head, None for a model without one. `weights` are the routing weights
    {expert: mean over layer groups}, None for a model that does not route. `mode` is how it was merged.
    """

    path: str
    prediction: str | None = None
    probability: float | None = None
    uncertainty: float | None = None
    weights: dict[str, float] | None = None
    mode: str | None = None
    reject: str | None = None


def check_output(path: Path) -> None:
    """Raise ConfigError unless predictions can be written to `path`: a .parquet or .jsonl file, or `-`."""
    if path == STANDARD_OUTPUT:
        return
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"output {path}: give a name that ends in {' or '.join(SUFFIXES)}, or - for JSON lines")
    if path.is_dir() or not path.absolute().parent.is_dir():
        fault = "is a folder" if path.is_dir() else f"its folder {path.absolute().parent} does not exist"
        raise ConfigError(f"output {path}: {fault}; name a file in a folder that is there")


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write them, in one step; `-` is the standard output."""
    lines = "".join(json.dumps(asdict(each)) + "\n" for each in predictions)
    if path == STANDARD_OUTPUT:
        sys.stdout.write(lines)
        return
    # Under another name until it is whole: nobody reads half a table.
    temporary = path.with_name(f".{path.name}.tmp")
    if path.suffix == ".jsonl":
        temporary.write_text(lines, encoding="utf-8")
    else:
        _write_table(temporary, predictions)
    temporary.replace(path)


def _write_table(path: Path, predictions: Sequence[Prediction]) -> None:
    experts = list(dict.fromkeys(name for each in predictions for name in each.weights or ()))
    schema = pa.schema(
        [
            field("path", pa.string()),
            field("prediction", pa.string(), nullable=True),  # null: see reject
            field("probability", pa.float32(), nullable=True),
            field("uncertainty", pa.float32(), nullable=True),
            *(field(f"{WEIGHT}{expert}", pa.float32(), nullable=True) for expert in experts),
            field("mode", pa.string(), nullable=True),
            field("reject", pa.string(), nullable=True),
        ]
    )
    columns = {
        name: [(each.weights or {}).get(name.removeprefix(WEIGHT)) for each in predictions]
        if name.startswith(WEIGHT)
        else [getattr(each, name) for each in predictions]
        for name in schema.names
    }
    write_table(path, schema, columns)
