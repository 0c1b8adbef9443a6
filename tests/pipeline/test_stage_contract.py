"""What every stage of the flow promises, checked on the units that a real run made."""

import pickle
from pathlib import Path

import pytest
from finished import Finished

from pipeline.plan import StagePlan, walk
from pipeline.stage import StageReport, Unit
from pipeline.store import Artefact, canonical_json, unit_key
from pipeline.store.layout import NOT_STAGES
from pipeline.workflow import STAGES, Workflow


@pytest.fixture(scope="module")
def plans(finished_store: Finished) -> list[StagePlan]:
    found = list(walk(Workflow.load(finished_store.config).stages, finished_store.store))
    assert all(isinstance(plan, StagePlan) for plan in found)
    return [plan for plan in found if isinstance(plan, StagePlan)]


def test_a_stage_needs_only_stages_before_it_and_has_a_name_of_its_own() -> None:
    done: set[str] = set()
    kinds: dict[str, int] = {}
    for stage in STAGES:
        assert set(stage.needs) <= done, f"{stage.name} needs {set(stage.needs) - done}, which come later"
        assert stage.version >= 1 and stage.what
        done.add(stage.name)
        kinds[stage.name] = kinds.get(stage.name, 0) + 1
    assert set(kinds.values()) == {1}
    assert not done & NOT_STAGES


def test_a_manifest_holds_all_that_its_key_was_made_of(finished_store: Finished) -> None:
    for path, manifest in finished_store.store.units():
        key = unit_key(
            stage=manifest.stage,
            version=manifest.version,
            spec=manifest.spec,
            settings=manifest.settings,
            inputs=[(name, digest) for name, digest in manifest.inputs],
            seed=manifest.seed,
        )
        assert key == manifest.key
        assert path == finished_store.path / manifest.stage / f"{manifest.unit}-{key[:12]}"
        assert manifest.damage(path, contents=True) is None


def test_inputs_are_digests_of_units_of_earlier_stages(plans: list[StagePlan]) -> None:
    digests: dict[str, str] = {}
    for plan in plans:
        for each in plan.planned:
            for artefact in each.unit.inputs:
                assert artefact.stage in plan.stage.needs
                assert digests[f"{artefact.stage}/{artefact.unit}"] == artefact.digest
        digests |= {f"{a.stage}/{a.unit}": a.digest for a in plan.artefacts}


def test_no_row_is_lost(finished_store: Finished) -> None:
    for _, manifest in finished_store.store.units():
        report = manifest.report
        assert report["rows_in"] == report["rows_out"] + report["rejected"], f"{manifest.stage}/{manifest.unit}"
        assert set(report) == {"rows_in", "rows_out", "rejected", "metrics", "seconds", "spans", "notes"}


def test_what_travels_to_a_worker_can_and_is_paths_and_names(plans: list[StagePlan]) -> None:
    for plan in plans:
        assert pickle.loads(pickle.dumps(plan.stage)).hashed_spec() == plan.stage.hashed_spec()
        for each in plan.planned:
            canonical_json(dict(each.unit.settings))
            sent = pickle.dumps(each)
            assert pickle.loads(sent).unit.settings == each.unit.settings
            assert len(sent) < 200_000, f"{plan.stage.name}/{each.unit.id} sends {len(sent)} bytes"


def test_what_changes_speed_changes_no_key(finished_store: Finished) -> None:
    faster = {stage.name: {"cpus": 2, "threads": 2, "batch_size": 3} for stage in STAGES}
    config = finished_store.tiny.write(
        "faster.yaml", resources=faster, executor={"kind": "ray", "cpus": 2}, tracking={"enabled": True}
    )
    for plan in walk(Workflow.load(config).stages, finished_store.store):
        assert isinstance(plan, StagePlan) and not plan.missing
        assert plan.stage.resources.batch_size == 3


def test_the_seed_counts_where_something_is_drawn_and_nowhere_else(finished_store: Finished) -> None:
    other = Workflow.load(finished_store.config, ["seed=1"])
    seeded = {stage.name for stage in other.stages if stage.seed == 1}
    drawing = {"fit_head", "radius", "activations", "baselines", "surgery", "fit_router"}
    assert seeded == drawing  # base and experts too, where they are trained
    reused = [p.stage.name for p in walk(other.stages, finished_store.store) if isinstance(p, StagePlan) and p.found]
    assert reused == ["shard", "base", "experts", "embed", "corrupt"]


def test_a_unit_finds_its_inputs_by_stage_and_name() -> None:
    def made(stage: str, unit: str) -> Artefact:
        return Artefact(stage, unit, "", Path(), "", 0, {}, {})

    unit = Unit("u", inputs=(made("shard", "a"), made("base", "base"), made("shard", "b")))
    assert [artefact.unit for artefact in unit.of("shard")] == ["a", "b"]
    assert unit.one("base").unit == "base" and unit.one("shard", "b").unit == "b"
    with pytest.raises(AssertionError, match="2 inputs from shard"):
        unit.one("shard")
    with pytest.raises(AssertionError, match="0 inputs from head"):
        unit.one("head")


def test_spans_add_up_even_when_their_block_raises() -> None:
    report = StageReport(1, 1)
    with report.span("decode"):
        pass
    once = report.seconds["decode"]
    with pytest.raises(ValueError, match="inside"), report.span("decode"):
        raise ValueError("inside")
    assert report.seconds["decode"] > once > 0
