"""plan: what would run and why, without doing or changing anything."""

from pathlib import Path

import pytest
from finished import Finished
from own_stages import NumbersSpec, SquareSpec, own_workflow, run_own, snapshot
from processes import bd_merge
from tiny import Tiny

from pipeline.plan import StagePlan, estimate, reason, walk
from pipeline.run import run
from pipeline.store import Store
from pipeline.workflow import STAGES, Workflow


def reasons(workflow: Workflow) -> dict[str, str]:
    """{stage/unit: why it must run}, as far as the plan can see."""
    store = Store(workflow.store_path)
    history = [manifest for _, manifest in store.units()]
    return {
        f"{plan.stage.name}/{each.unit.id}": reason(plan, each, history)
        for plan in walk(workflow.stages, store)
        if isinstance(plan, StagePlan)
        for each in plan.missing
    }


def test_nothing_is_planned_after_a_run(finished_store: Finished) -> None:
    plans = list(walk(Workflow.load(finished_store.config).stages, finished_store.store))
    assert len(plans) == len(STAGES)
    assert all(isinstance(plan, StagePlan) and not plan.missing for plan in plans)
    # What is joined exactly needs no index.
    assert [plan.stage.name for plan in plans if isinstance(plan, StagePlan) and not plan.planned] == ["index"]


def test_a_plan_of_a_new_store_says_never_made_and_creates_nothing(tiny_project: Tiny, tmp_path: Path) -> None:
    ended = bd_merge("plan", tiny_project.write(), output=tmp_path / "output")
    assert ended.exit_code == 0
    shard = next(line for line in ended.output.splitlines() if "shard" in line and "never made" in line)
    assert "low-train-00000" in shard and " 6 " in shard
    assert not (tiny_project.root / "store").exists()


def test_a_plan_names_the_option_that_changed_and_changes_nothing(finished_copy: Finished, tmp_path: Path) -> None:
    before = snapshot(finished_copy.tiny.root)
    command = ["plan", finished_copy.config, "fit_head.steps=7", "index.sample=50", "corrupt.levels.L1=2"]
    ended = bd_merge(*command, output=tmp_path / "output")
    assert ended.exit_code == 0
    for expected in ("head: steps 6 -> 7", "radius: sample 96 -> 50", "settings.severity 1 -> 2"):
        assert expected in ended.output
    assert snapshot(finished_copy.tiny.root) == before


def test_every_reason_has_its_words(tiny_project: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    record = run_own(tiny_project)
    store = Store(tiny_project.root / "store")
    assert reasons(own_workflow(tiny_project)) == {}
    assert reasons(own_workflow(tiny_project, seed=1)) == {f"numbers/n-{i}": "seed 0 -> 1" for i in range(4)}
    assert reasons(own_workflow(tiny_project, squares=SquareSpec(power=3)))["squares/n-0"] == "power 2 -> 3"
    assert reasons(own_workflow(tiny_project, numbers=NumbersSpec(count=5))) == {"numbers/n-4": "never made"}

    changed = own_workflow(tiny_project)
    monkeypatch.setattr(type(changed.stages[2]), "version", 2)
    assert reasons(changed) == {"total/total": "stage version 1 -> 2"}
    monkeypatch.undo()

    record.artefacts(store)["squares"][1].file("square.json").write_bytes(b"12345")
    assert reasons(own_workflow(tiny_project)) == {"squares/n-1": "its files are damaged"}


def test_another_input_is_named(tiny_project: Tiny) -> None:
    run_own(tiny_project)
    squares_only = own_workflow(tiny_project, squares=SquareSpec(power=4))
    squares_only.stages = squares_only.stages[:2]
    run(squares_only, "bd-merge run own.yaml")
    # 0 and 1 are their own powers, so the bytes of these two units are as before.
    found = reasons(own_workflow(tiny_project, squares=SquareSpec(power=4)))
    assert found == {"total/total": "other input squares/n-2, squares/n-3"}


def test_estimates_are_means_of_earlier_units(tiny_project: Tiny) -> None:
    store = Store(tiny_project.root / "store")
    larger = own_workflow(tiny_project, numbers=NumbersSpec(count=10, bytes=100))
    first = next(walk(larger.stages, store))
    assert isinstance(first, StagePlan)
    assert estimate(first, [], parallelism=2).based_on == 0
    run_own(tiny_project)
    history = [manifest for _, manifest in store.units()]
    plan = next(walk(larger.stages, store))
    assert isinstance(plan, StagePlan) and len(plan.missing) == 6
    own = [m for m in history if m.stage == "numbers"]
    found = estimate(plan, history, parallelism=2)
    assert found.based_on == 4
    assert found.size_bytes == pytest.approx(6 * sum(m.size_bytes for m in own) / 4)
    assert found.seconds == pytest.approx(6 * sum(m.made["process_s"] for m in own) / 4 / 2)
