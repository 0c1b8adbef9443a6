"""Shards that arrive cost their own joins, and the graph is then that of a rebuild: same edges, same bytes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pooled import built, by_brute_force, bytes_of, clustered, edges_of, edges_of_parts, in_shards

from bd_core.neighbourhood import adaptive_min_cosine, radius_graph
from pipeline.neighbourhoods.partitions import partitions
from pipeline.neighbourhoods.radius import Radius
from pipeline.neighbourhoods.spec import IndexSpec
from pipeline.stages.neighbours import NeighboursSpec, measured_recall
from pipeline.stages.radius import calibration_units
from pipeline.store import Artefact, Store

Pools = dict[str, dict[str, list[Artefact]]]

OLD, NEW, ROOM = [15] * 6, [15], 30
ROWS = clustered(105, seed=7)
SPECS: dict[str, dict[str, Any]] = {
    "exact": {"min_cosine": 0.6},
    "flat": {"min_cosine": 0.6, "backend": "flat"},
    "ivf": {"min_cosine": 0.6, "backend": "ivf"},
    "calibrated": {"max_isolated": 0.1},
    "adaptive": {"radius": "adaptive", "target_degree": 5},
    "adaptive ivf": {"radius": "adaptive", "target_degree": 5, "backend": "ivf"},
}


def spec(name: str) -> IndexSpec:
    return IndexSpec(rows_per_partition=ROOM, calibration_rows=60, sample=50, recall_sample=40, **SPECS[name])


@pytest.mark.parametrize("name", SPECS)
def test_new_shards_cost_their_own_joins_and_the_result_is_that_of_a_rebuild(name: str, tmp_path: Path) -> None:
    store, afresh = Store(tmp_path / "grown"), Store(tmp_path / "afresh")
    old = in_shards(store, ROWS[:90], OLD)
    _, made = built(store, old, spec(name))
    grown = [*old, *in_shards(store, ROWS[90:], NEW, first=6)]
    artefacts, added = built(store, grown, spec(name))
    rebuilt, everything = built(afresh, in_shards(afresh, ROWS, [*OLD, *NEW]), spec(name))

    assert bytes_of(artefacts["neighbours"]) == bytes_of(rebuilt["neighbours"])
    assert bytes_of(artefacts["edges"]) == bytes_of(rebuilt["edges"])
    new = changed_partitions(old, grown)
    touched = [unit for unit in added if unit.startswith("edges/")]
    assert touched == [unit for unit in everything if unit.startswith("edges/") and new & set(unit[6:].split("--"))]
    assert 0 < len(touched) < sum(unit.startswith("edges/") for unit in made)
    assert not any(unit.startswith("radius/") for unit in added)
    assert {unit[6:] for unit in added if unit.startswith("index/")} == (new if "ivf" in name else set())


def changed_partitions(old: Any, grown: Any) -> set[str]:
    before = {tuple(each.unit for each in part.units) for part in partitions(old, ROOM)}
    return {part.id for part in partitions(grown, ROOM) if tuple(each.unit for each in part.units) not in before}


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Pools:
    """The pool's artefacts by back end, in one store."""
    store = Store(tmp_path_factory.mktemp("pools"))
    units = in_shards(store, ROWS, [*OLD, 0, *NEW])
    return {name: built(store, units, spec(name))[0] for name in ("exact", "ivf")}


def test_the_graph_is_that_of_brute_force_and_of_one_partition(pools: Pools) -> None:
    whole = by_brute_force(ROWS, 0.6)
    for artefacts in pools.values():
        assert edges_of_parts(artefacts["neighbours"]) == whole
    one = spec("exact").model_copy(update={"rows_per_partition": 1000})
    artefacts, made = built(store_of(pools), pools["exact"]["embed"], one)
    assert edges_of_parts(artefacts["neighbours"]) == whole
    assert [unit for unit in made if unit.startswith("edges/")] == ["edges/low-train-00000"]


def store_of(pools: Pools) -> Store:
    return Store(pools["exact"]["embed"][0].path.parents[1])


def test_adaptive_radii_are_those_of_the_whole_pool(tmp_path: Path) -> None:
    store, whole = Store(tmp_path), torch.from_numpy(ROWS)
    wanted = edges_of(radius_graph(whole, adaptive_min_cosine(whole, 5)))
    units = in_shards(store, ROWS, [*OLD, *NEW])
    for name in ("adaptive", "adaptive ivf"):
        found = edges_of_parts(built(store, units, spec(name))[0]["neighbours"])
        assert len(found & wanted) >= 0.99 * len(wanted) and len(found) <= 1.01 * len(wanted), name
        assert name == "adaptive ivf" or found == wanted


def test_a_pinned_radius_survives_another_calibration_sample(pools: Pools) -> None:
    other = spec("exact").model_copy(update={"calibration_rows": 30})
    _, made = built(store_of(pools), pools["exact"]["embed"], other)
    assert made == ["radius/radius"]  # the same decision, so nothing that follows is made again


def test_the_calibration_looks_at_the_first_shards_of_every_task(tmp_path: Path) -> None:
    store = Store(tmp_path)
    low, high = in_shards(store, ROWS[:80], [20] * 4), in_shards(store, ROWS[80:], [20] * 3, task="high")
    chosen = calibration_units([*low, *high], 50)
    assert [unit.unit for unit in chosen] == [f"{t}-train-0000{i}" for t in ("high", "low") for i in (0, 1)]
    assert calibration_units([*low[:2], *high], 50) == chosen


def test_edge_recall_is_measured_in_every_join_and_stands_in_the_manifests(pools: Pools) -> None:
    for join in pools["ivf"]["edges"]:
        metrics = join.report["metrics"]
        assert 0 <= metrics["recall_found"] <= metrics["recall_edges"]
        assert metrics["recall_edges"] == 0 or metrics["edge_recall"] > 0.9
    assert (measured_recall(pools["ivf"]["edges"]) or 0) >= 0.99
    assert measured_recall(pools["exact"]["edges"]) is None


def test_lists_are_added_until_the_recall_holds_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    monkeypatch.setattr("pipeline.stages.radius.probes_needed", lambda *_, **__: 1)  # a sample that knew no better
    monkeypatch.setattr("pipeline.logs.LOGGER.propagate", True)
    caplog.set_level("INFO", logger="bd-merge")
    artefacts, _ = built(store, in_shards(store, ROWS, [*OLD, *NEW]), spec("ivf"))
    assert Radius.read(artefacts["radius"][0].path).n_probes == 1
    raised = [join.report["notes"]["probes_raised"] for join in artefacts["edges"] if join.report["notes"]]
    assert raised and all(steps == [2**k for k in range(len(steps))] for steps in raised)
    assert "more lists are searched" in caplog.text
    assert (measured_recall(artefacts["edges"]) or 0) >= 0.99


def test_a_degree_cap_is_off_and_counted_when_it_is_on(pools: Pools) -> None:
    free = pools["exact"]
    capped, made = built(store_of(pools), free["embed"], spec("exact"), NeighboursSpec(max_degree=3))
    assert {unit.partition("/")[0] for unit in made} == {"neighbours"}
    for before, after in zip(free["neighbours"], capped["neighbours"], strict=True):
        degree = np.diff(np.load(before.file("offsets.npy")))
        assert before.report["metrics"]["truncated"] == 0
        assert after.report["metrics"]["max_degree"] <= 3
        assert after.report["metrics"]["truncated"] == np.maximum(degree - 3, 0).sum()
