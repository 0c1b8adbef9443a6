"""Every method in one run, with a task that no expert is merged for: the table a user chooses a merge by."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from cards import run_card
from finished import copied
from safetensors.torch import load_file
from tiny import CLASSES, Tiny

from bd_core.methods import METHODS
from pipeline.costs import read_costs
from pipeline.forecast import forecast_bytes
from pipeline.formats.schemas import PREDICTIONS
from pipeline.formats.tables import read_table
from pipeline.record import RunRecord
from pipeline.reporting import fronts
from pipeline.reporting.gallery import Gallery
from pipeline.reporting.numbers import Numbers
from pipeline.reporting.parts import Parts
from pipeline.run import run
from pipeline.stages.activations import GRAMS, SQUARES
from pipeline.store import Artefact, Store
from pipeline.workflow import Workflow

SMALL: dict[str, dict[str, Any]] = {
    "wudi": {"steps": 2},
    "doge": {"steps": 2},
    "bmm": {"trials": 3},
    "map": {"trials": 24, "verified": 1},
    "adamerging": {"steps": 2},
    "surgery": {"steps": 2, "after": "adamerging"},
    "wemoe": {"steps": 2},
}
TWICE = {
    "ties_mean": {"method": "ties", "merge": "mean"},
    "bmm_free": {"method": "bmm", "trials": 0, "data_free": True},
}
UNSEEN = "new"
OURS = {"bd_task", "bd_layer"}


@dataclass(frozen=True)
class Everything:
    """The finished run."""

    tiny: Tiny
    record: RunRecord
    artefacts: dict[str, list[Artefact]]

    def unit(self, stage: str, unit: str) -> Artefact:
        return next(artefact for artefact in self.artefacts[stage] if artefact.unit == unit)

    def metrics(self, model: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.unit("evaluate", model).file("metrics.json").read_text())
        return found


@pytest.fixture(scope="module")
def everything(tiny_original: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Everything:
    tiny = copied(tiny_original, tmp_path_factory.mktemp("everything") / "project")
    shutil.copytree(tiny.root / "images" / "high" / "test", tiny.root / "images" / UNSEEN / "test")
    shutil.copytree(tiny.root / "images" / "low" / "train", tiny.root / "images" / UNSEEN / "train")
    other = {**tiny.config["tasks"][0], "name": UNSEEN}
    other["source"] = {"kind": "folder", "path": str(tiny.root / "images" / UNSEEN)}
    for name in ("zero", "one", "two", "three", "four", "five"):
        (tiny.root / "images" / UNSEEN / "train" / name).mkdir(exist_ok=True)
    methods = {name: SMALL.get(name, {}) for name, method in METHODS.items() if method.experts == "checkpoints"}
    config = tiny.write(
        "everything.yaml",
        tasks=[*tiny.config["tasks"], other],
        baselines={"validation_per_task": 6, "batch_per_task": 4, "methods": methods | TWICE},
        evaluate={"unseen": [UNSEEN]},
        corrupt={"corruptions": ["brightness"], "levels": {"L1": 1}},
    )
    workflow = Workflow.load(config)
    # The report of so many rows is drawn for seconds; what of it is of this run alone is asked for below.
    workflow.stages = [stage for stage in workflow.stages if stage.name not in ("report", "detect")]
    record = run(workflow, f"bd-merge run {config}")
    return Everything(tiny, record, record.artefacts(Store(tiny.root / "store")))


def test_every_method_is_evaluated_and_says_what_it_needs(everything: Everything) -> None:
    methods = {name for name, method in METHODS.items() if method.experts == "checkpoints"} | set(TWICE)
    models = {unit.unit for unit in everything.artefacts["evaluate"]}
    assert models == methods | OURS | {"pretrained", "experts"}
    for name in methods:
        told = everything.metrics(name)["method"]
        if told["method"] != "bmm":
            assert told["need"] == METHODS[told["method"]].need
    assert everything.metrics("bmm")["method"]["need"] == "labelled validation"
    assert everything.metrics("bmm_free")["method"]["need"] == "nothing"
    assert everything.metrics("ties_mean")["title"] == "Ties-Merging (merge mean)"


def test_what_must_be_told_the_task_has_no_task_free_accuracy(everything: Everything) -> None:
    without = {unit.unit for unit in everything.artefacts["evaluate"] if _free(everything, unit.unit) is None}
    assert without == {"experts", "surgery"}


def _free(everything: Everything, model: str) -> object:
    return everything.metrics(model)["protocols"]["task_free"]


def test_an_unseen_task_is_evaluated_and_nothing_else(everything: Everything) -> None:
    assert {unit.unit for unit in everything.artefacts["experts"]} == set(CLASSES)
    assert not any(unit.unit.startswith(UNSEEN) for unit in everything.artefacts["embed"])
    for model in ("pretrained", "ties", "bd_layer"):
        metrics = everything.metrics(model)
        cell = metrics["protocols"]["task_known"]["clean"]
        assert metrics["unseen"] == [UNSEEN] and cell["tasks"][UNSEEN]["n"]
        seen = [cell["tasks"][task]["accuracy"] for task in CLASSES]
        assert cell["mean"]["accuracy"] == pytest.approx(sum(seen) / len(seen))
        assert cell["mean_unseen"]["accuracy"] == cell["tasks"][UNSEEN]["accuracy"]
    for model in ("experts", "surgery"):  # they have nothing for a task whose expert is not there
        assert everything.metrics(model)["protocols"]["task_known"]["clean"]["tasks"][UNSEEN]["n"] == 0


def test_gram_matrices_are_made_once_for_all_that_ask(everything: Everything) -> None:
    assert {unit.unit for unit in everything.artefacts["activations"]} == set(CLASSES)
    tower = load_file(everything.unit("experts", "low").file("visual.safetensors"))
    grams = load_file(everything.unit("activations", "low").file(GRAMS))
    assert set(grams) == {n for n in tower if tower[n].ndim == 2 and ".resblocks." in n}
    for name, gram in grams.items():
        assert gram.shape == (tower[name].shape[1],) * 2
        assert torch.linalg.eigvalsh(gram.double()).min() > -1e-5
    squares = load_file(everything.unit("activations", "low").file(SQUARES))
    assert {name for name in tower if ".ln_" in name and name.endswith("weight")} <= set(squares)


def test_a_plan_tells_the_gram_matrices_and_experts_to_the_byte_of_their_tensors(everything: Everything) -> None:
    told = forecast_bytes(Workflow.load(everything.tiny.root / "everything.yaml"))
    files = {"activations": GRAMS, "experts": "visual.safetensors"}
    for stage, name in files.items():
        tensors = [value for unit in everything.artefacts[stage] for value in load_file(unit.file(name)).values()]
        assert told[stage] == sum(value.nbytes for value in tensors)


def test_a_run_whose_methods_need_none_has_no_activations(tiny_project: Tiny) -> None:
    workflow = Workflow.load(tiny_project.write(baselines={"methods": {"ties": {}}}))
    assert "activations" not in forecast_bytes(workflow)
    stages = {stage.name: stage for stage in workflow.stages}
    assert stages["activations"].units({"base": [], "experts": [], "embed": [], "shard": []}) == []
    assert stages["surgery"].units({name: [] for name in stages["surgery"].needs}) == []


def test_costs_are_measured_and_no_file_holds_a_clock(everything: Everything) -> None:
    costs = read_costs(everything.artefacts)
    assert set(costs) == {unit.unit for unit in everything.artefacts["evaluate"]} - {"pretrained", "experts"}
    for model, cost in costs.items():
        assert cost.seconds > 0 and cost.memory_bytes is not None and cost.price is not None
        one_set_of_weights = model in TWICE or (model in METHODS and METHODS[model].result != "per sample")
        assert (cost.price == 1.0) == one_set_of_weights, model
    activations = {f"activations/{task}" for task in CLASSES}
    for model, stages in (("regmean", activations), ("ties", set()), ("surgery", {"baselines/adamerging"})):
        made = {f"{unit.stage}/{unit.unit}" for unit in costs[model].units}
        assert made - {f"baselines/{model}", f"surgery/{model}", f"evaluate/{model}"} == stages
    for unit in (*everything.artefacts["baselines"], *everything.artefacts["evaluate"]):
        for file in unit.path.glob("*.json"):
            assert file.name == "manifest.json" or "seconds" not in file.read_text(encoding="utf-8")


def test_maps_front_is_a_table_and_the_chosen_point_is_told(everything: Everything) -> None:
    unit, numbers = everything.unit("baselines", "map"), Numbers()
    chosen = json.loads(unit.file("recipe.json").read_text(encoding="utf-8"))["chosen"]
    assert set(chosen["coefficients"]) == set(chosen["measured"]) == set(CLASSES)
    gallery = Gallery()
    page = fronts.section(Parts(everything.artefacts), gallery, numbers)
    assert "Trade-offs of MAP" in page and set(gallery.pictures) == {"front_map"}
    assert numbers.values["front.map.measured.low"]["value"] == chosen["measured"]["low"]
    assert page.count("<tr>") == 1 + min(chosen["front"], fronts.MOST_ROWS)


def test_bmm_is_never_worse_on_its_validation_images_than_its_closed_form(everything: Everything) -> None:
    unit = everything.unit("baselines", "bmm")
    chosen = json.loads(unit.file("recipe.json").read_text(encoding="utf-8"))["chosen"]
    history = pq.read_table(unit.file("history.parquet")).to_pydict()
    assert chosen["validation_accuracy"] == max(history["validation_accuracy"]) >= history["validation_accuracy"][0]
    assert set(chosen["log10_lambda"]) == set(chosen["scale"])


@pytest.mark.parametrize("model", ["surgery", "wemoe"])
def test_the_card_alone_runs_what_is_more_than_one_tower(everything: Everything, model: str, tmp_path: Path) -> None:
    table = read_table(everything.unit("evaluate", model).file("predictions.parquet"), PREDICTIONS).to_pylist()
    clean = {row["sample_id"]: row for row in table if row["task"] == "high" and row["level"] == "clean"}
    images = _images(everything, "high")
    chosen = [name for name in images if name in clean][:6]
    stage = "surgery" if model == "surgery" else "baselines"
    names = run_card(everything.unit(stage, model).path, [images[name] for name in chosen], "high", tmp_path)
    confidence = torch.tensor([clean[name]["confidence"] for name in chosen])
    torch.testing.assert_close(names["probabilities"].amax(-1), confidence, rtol=1e-4, atol=1e-4)


def _images(everything: Everything, task: str) -> dict[str, Path]:
    """{sample id: file} of the task's test images."""
    files = sorted((everything.tiny.root / "images" / task / "test").rglob("*.png"))
    return {hashlib.sha256(file.read_bytes()).hexdigest()[:16]: file for file in files}
