"""Bad vectors, indexes and joins: an error that names place and next step, and nothing half-used."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pooled import built, clustered, in_shards

from pipeline.errors import ConfigError, DataError
from pipeline.formats.vectors import write_vectors
from pipeline.neighbourhoods.features import features_at, read_features
from pipeline.neighbourhoods.spec import IndexSpec
from pipeline.stages.edges import Edges
from pipeline.stages.index import INDEX
from pipeline.stages.neighbours import Neighbours, NeighboursSpec, check_recall
from pipeline.stages.radius import FixRadius
from pipeline.store import Artefact, Store

ROWS = clustered(60)
IVF = IndexSpec(min_cosine=0.6, backend="ivf", rows_per_partition=20, recall_sample=20)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda rows: rows.__setitem__((3, 2), np.nan), r"embed unit low-train-00001: row 3 has nan or inf"),
        (lambda rows: rows.__setitem__(5, 2 * rows[5]), r"low-train-00001: row 5 has a length other than 1"),
        (lambda rows: rows.__setitem__(0, 0.0), r"low-train-00001: row 0 has a length other than 1"),
    ],
)
def test_a_row_that_is_no_unit_vector_is_named(tmp_path: Path, spoil: Any, says: str) -> None:
    store, rows = Store(tmp_path), ROWS.copy()
    spoil(rows[20:40])
    with pytest.raises(RuntimeError, match=rf"radius radius: .*{says}.*; drop broken rows.*the file is .*features.npy"):
        built(store, in_shards(store, rows, [20, 20, 20]), IndexSpec(min_cosine=0.6))
    assert not (tmp_path / "edges").exists() and not list((tmp_path / "radius").iterdir())


def test_shards_of_two_backbones_are_refused_before_any_work(tmp_path: Path) -> None:
    store = Store(tmp_path)
    units = [*in_shards(store, ROWS, [30, 30]), *in_shards(store, clustered(30, width=8), [30], first=2)]
    with pytest.raises(
        DataError, match=r"low-train-00000 are 16 wide, those of low-train-00002 8; embed both with one"
    ):
        FixRadius(IndexSpec()).units({"embed": units})


def test_features_cut_short_or_of_another_length_are_refused(tmp_path: Path) -> None:
    units = in_shards(Store(tmp_path), ROWS, [30, 30])
    write_vectors(units[1].file("features.npy"), ROWS[:7])
    with pytest.raises(DataError, match=r"has 7 rows, its unit reports 30; remove the unit"):
        read_features(units)
    units[0].file("features.npy").write_bytes(units[0].file("features.npy").read_bytes()[:500])
    with pytest.raises(DataError, match="cannot be read"):
        features_at(units, np.array([1, 2]))


def test_only_the_rows_asked_for_are_read(tmp_path: Path) -> None:
    units = in_shards(Store(tmp_path), ROWS, [20, 0, 25, 15])
    rows = np.array([0, 19, 20, 44, 45, 59])
    assert np.array_equal(features_at(units, rows).numpy(), ROWS[rows])
    units[2].file("features.npy").unlink()
    assert np.array_equal(features_at(units, rows[[0, 1, 4]]).numpy(), ROWS[rows[[0, 1, 4]]])


def spoilt_join(tmp_path: Path, spoil: Any) -> str:
    """What the joins say of an index that was spoilt behind the store's back, sizes kept where `spoil` keeps them."""
    store = Store(tmp_path)
    units = in_shards(store, ROWS, [20, 20, 20])
    artefacts, _ = built(store, units, IVF)
    spoil(artefacts)
    stage = Edges(IVF)
    out = tmp_path / "out"
    messages = []
    for unit in stage.units(artefacts):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        try:
            stage.process(unit, out)
        except DataError as error:
            messages.append(str(error))
            assert not list(out.iterdir()), "a join that fails has written nothing"
    return messages[0]


def test_an_index_cut_short_is_refused(tmp_path: Path) -> None:
    def cut(artefacts: dict[str, list[Artefact]]) -> None:
        path = artefacts["index"][0].file(INDEX)
        path.write_bytes(path.read_bytes()[:-100])

    assert "is not a readable FAISS index" in spoilt_join(tmp_path, cut)


def test_an_index_of_another_part_or_backbone_is_refused(tmp_path: Path) -> None:
    def swap(artefacts: dict[str, list[Artefact]]) -> None:
        shutil.copyfile(artefacts["index"][1].file(INDEX), artefacts["index"][0].file(INDEX))

    assert "it is from another backbone, or from another part of the pool" in spoilt_join(tmp_path, swap)


def test_a_partition_without_its_index_or_its_join_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artefacts, _ = built(store, in_shards(store, ROWS, [20, 20, 20]), IVF)
    lost = artefacts["index"].pop(1)
    with pytest.raises(DataError, match=rf"the index of partition {lost.unit} is missing"):
        Edges(IVF).units(artefacts)
    join = artefacts["edges"].pop(1)
    with pytest.raises(DataError, match=rf"the join {join.unit} is missing, so low-train-00000 would lack neighbours"):
        Neighbours(NeighboursSpec(), IVF).units(artefacts)


def test_a_join_whose_files_do_not_belong_together_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    artefacts, _ = built(store, in_shards(store, ROWS, [20, 20, 20]), IndexSpec(min_cosine=0.6))
    write_vectors(artefacts["edges"][0].file("forward") / "neighbours.npy", np.arange(5, dtype=np.int32))
    stage = Neighbours(NeighboursSpec(), IndexSpec())
    with pytest.raises(DataError, match=r"5 neighbours and \d+ cosines.*remove its unit"):
        stage.process(stage.units(artefacts)[0], tmp_path)


def test_a_recall_that_is_too_low_over_all_joins_is_an_error() -> None:
    def join(wanted: float, found: float) -> Artefact:
        metrics = {"recall_edges": wanted, "recall_found": found}
        return Artefact("edges", "e", "", Path(), "", 0, {"metrics": metrics}, {})

    check_recall([join(100, 99), join(0, 0)], 0.99)
    with pytest.raises(DataError, match=r"edge recall is 0.9850 over all 2 joins.*set it to 0.995 for the joins"):
        check_recall([join(100, 98), join(100, 99)], 0.99)


def test_more_lists_than_rows_to_train_them_on_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    few = IVF.model_copy(update={"expected_rows": 10**6})
    with pytest.raises(RuntimeError, match=r"index.calibration_rows 131072: 60 images to train 4096 lists on"):
        built(store, in_shards(store, ROWS, [30, 30]), few)


def test_a_target_degree_that_the_pool_cannot_give_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match=r"index.target_degree 60: the calibration sees 60 images"):
        built(store, in_shards(store, ROWS, [60]), IndexSpec(radius="adaptive", target_degree=60))


def test_a_join_beyond_the_memory_is_refused_before_it_begins(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ConfigError, match=r"index.memory_gib: a join of two partitions of \d+ x 16"):
        built(store, in_shards(store, ROWS, [30, 30]), IndexSpec(min_cosine=0.6, memory_gib=1e-5))
    assert not (tmp_path / "edges").exists()


def test_the_gpu_back_end_needs_a_gpu(tmp_path: Path) -> None:
    import faiss

    if hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this FAISS was built for GPUs")
    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match=r"index.backend gpu: this FAISS has no GPU.*take index.backend exact"):
        built(store, in_shards(store, ROWS, [60]), IndexSpec(min_cosine=0.6, backend="gpu"))
