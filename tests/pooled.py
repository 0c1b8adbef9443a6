"""Pools of vectors as `embed` leaves them, and their neighbourhoods by brute force."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bd_core.neighbourhood import Neighbourhoods
from infra.bench.synthetic_pool import carry_out, embed_unit, neighbourhood_stages
from pipeline.neighbourhoods.spec import IndexSpec
from pipeline.stages.neighbour_files import read_neighbourhoods
from pipeline.stages.neighbours import NeighboursSpec
from pipeline.store import Artefact, Store

Rows = NDArray[np.float32]
Edges = set[tuple[int, int]]


def clustered(n_rows: int, width: int = 16, seed: int = 0) -> Rows:
    """Unit vectors around a few centres."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(n_rows, width)) + 2 * generator.normal(size=(9, width))[np.arange(n_rows) % 9]
    unit: Rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit


def in_shards(store: Store, rows: Rows, sizes: Sequence[int], task: str = "low", first: int = 0) -> list[Artefact]:
    """Embed units of these sizes over the rows."""
    cuts = np.cumsum([0, *sizes])
    return [
        embed_unit(store, f"{task}-train-{number:05d}", rows[start:stop], task)
        for number, (start, stop) in enumerate(pairwise(cuts), first)
    ]


def by_brute_force(rows: Rows, min_cosine: float) -> Edges:
    """Every ordered pair at or within the radius: products in float64, rounded to float32."""
    cosine = (rows.astype(np.float64) @ rows.astype(np.float64).T).astype(np.float32)
    np.fill_diagonal(cosine, -2)
    return set(zip(*(each.tolist() for each in (cosine >= np.float32(min_cosine)).nonzero()), strict=True))


def edges_of(graph: Neighbourhoods, first_row: int = 0) -> Edges:
    """(anchor, neighbour) of every edge."""
    return set(zip((graph.anchors() + first_row).tolist(), graph.neighbours.tolist(), strict=True))


def edges_of_parts(parts: Sequence[Artefact]) -> Edges:
    """(anchor, neighbour) of every edge of a pool, from its `neighbours` units."""
    found: Edges = set()
    first_row = 0
    for part in sorted(parts, key=lambda each: each.unit):
        graph = read_neighbourhoods(part.path)
        found |= edges_of(graph, first_row)
        first_row += graph.n_anchors
    return found


def built(
    store: Store, embedded: Sequence[Artefact], spec: IndexSpec, neighbours: NeighboursSpec | None = None
) -> tuple[dict[str, list[Artefact]], list[str]]:
    """The artefacts of every stage, and which units were made for them."""
    torch.set_num_threads(1)
    made: list[str] = []
    artefacts = carry_out(
        neighbourhood_stages(spec, neighbours),
        {"embed": list(embedded)},
        store,
        lambda stage, artefact: made.append(f"{stage}/{artefact.unit}"),
    )
    return artefacts, made


def bytes_of(parts: Sequence[Artefact]) -> dict[str, bytes]:
    """{unit/file: bytes}."""
    return {
        f"{part.unit}/{path.relative_to(part.path)}": path.read_bytes()
        for part in parts
        for path in sorted(Path(part.path).rglob("*.npy"))
    }
