"""A pool of clustered unit vectors in a store, as `embed` would have left it, and the stages of its neighbourhoods.

Clusters have log-normal sizes and lie around fewer, wider ones: densities differ, and cells cut through clusters.
Shape letters: N rows, C clusters, D width.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Resources
from pipeline.executors.unit import UnitRunner
from pipeline.formats.vectors import write_vectors
from pipeline.neighbourhoods.spec import IndexSpec
from pipeline.plan import plan_stage
from pipeline.stage import Stage, StageReport
from pipeline.stages.edges import Edges
from pipeline.stages.index import Index
from pipeline.stages.neighbours import Neighbours, NeighboursSpec
from pipeline.stages.radius import FixRadius
from pipeline.store import Artefact, Store, commit

Rows = NDArray[np.float32]
MIN_COSINE = 0.5  # of most pairs within a cluster, and of few others
NOISE, SPREAD, SIZE_SPREAD = 0.9, 1.2, 0.5


class Clusters:
    """Draws rows of clusters whose mean degree within MIN_COSINE is about `degree`, for pools of about `n_rows`."""

    def __init__(self, n_rows: int, width: int = 512, degree: float = 50.0, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        size = degree / np.exp(1.5 * SIZE_SPREAD**2)
        n_clusters = max(2, round(n_rows / (size * np.exp(SIZE_SPREAD**2 / 2))))
        wide = _unit(generator.standard_normal((max(1, n_clusters // 30), width), dtype=np.float32))
        own = _unit(generator.standard_normal((n_clusters, width), dtype=np.float32))
        self._centre_CD = _unit(wide[generator.integers(len(wide), size=n_clusters)] + SPREAD * own)
        weight = np.exp(SIZE_SPREAD * generator.standard_normal(n_clusters))
        self._weight_C = weight / weight.sum()
        self._seed = seed

    def rows(self, n_rows: int, shard: int) -> Rows:
        """float32 [N, D], L2-normalised; equal for equal arguments."""
        generator = np.random.default_rng([self._seed, shard])
        cluster = generator.choice(len(self._weight_C), size=n_rows, p=self._weight_C)
        width = self._centre_CD.shape[1]
        noise = generator.standard_normal((n_rows, width), dtype=np.float32) * np.float32(NOISE / np.sqrt(width))
        return _unit(self._centre_CD[cluster] + noise)


def _unit(rows: Rows) -> Rows:
    normal: Rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return normal


def embed_unit(store: Store, name: str, features: Rows, task: str = "pool") -> Artefact:
    """One committed embed unit."""

    def produce(directory: Path) -> StageReport:
        write_vectors(directory / "features.npy", features)
        return StageReport(len(features), len(features), notes={"task": task})

    return commit(
        store,
        produce,
        stage="embed",
        unit=name,
        key=hashlib.sha256(name.encode() + features.tobytes()).hexdigest(),
        version=1,
        seed=None,
        spec={},
        settings={},
        inputs=[],
    )


def embedded(store: Store, clusters: Clusters, n_rows: int, shard_rows: int, first_shard: int = 0) -> list[Artefact]:
    """Embed units of `n_rows` rows together."""
    counts = [min(shard_rows, n_rows - start) for start in range(0, n_rows, shard_rows)]
    return [
        embed_unit(store, f"pool-train-{number:05d}", clusters.rows(count, number))
        for number, count in enumerate(counts, first_shard)
    ]


def neighbourhood_stages(
    spec: IndexSpec, neighbours: NeighboursSpec | None = None, threads: int = 1, seed: int = 0
) -> list[Stage]:
    """The stages from features to the radius graph."""
    resources = Resources(threads=threads)
    return [
        FixRadius(spec, resources, seed),
        Index(spec, resources),
        Edges(spec, resources),
        Neighbours(neighbours or NeighboursSpec(), spec, resources),
    ]


def carry_out(
    stages: Sequence[Stage],
    given: dict[str, list[Artefact]],
    store: Store,
    done: Callable[[str, Artefact], Any] = lambda stage, artefact: None,
) -> dict[str, list[Artefact]]:
    """The units of all stages, made in this process where the store lacks them; `done` is told of each made."""
    made = dict(given)
    for stage in stages:
        plan = plan_stage(stage, {name: made[name] for name in stage.needs}, store)
        runner = UnitRunner(store, "bench")
        if plan.missing:
            stage.expect([each.unit for each in plan.missing])
        for each in plan.missing:
            outcome = runner(stage, each, stage.name)
            if outcome.artefact is None:
                raise RuntimeError(f"{stage.name} {each.unit.id}: {outcome.error}")
            plan.found[each.unit.id] = outcome.artefact
            done(stage.name, outcome.artefact)
        made[stage.name] = plan.artefacts
    return made
