"""Which methods are compared with: any list, each with what it needs, every fault told before any work."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bd_core.methods import METHODS
from pipeline.config import load_yaml, parse
from pipeline.stages.method_list import BaselinesSpec, entry_of
from pipeline.workflow import Config


def fault(**methods: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as error:
        BaselinesSpec(methods=methods)
    return str(error.value)


def test_one_method_stands_in_as_many_rows_as_its_settings_differ() -> None:
    spec = BaselinesSpec(methods={"ties": {}, "ties_mean": {"method": "ties", "merge": "mean", "keep": 1}})
    plain, mean = spec.entries()
    assert (plain.method.name, plain.parameters, plain.title) == ("ties", {}, "Ties-Merging")
    assert mean.method is plain.method and mean.title == "Ties-Merging (merge mean, keep 1.0)"
    assert type(mean.parameters["keep"]) is float, "1 is 1.0 where a share is asked for"


def test_every_method_of_whole_checkpoints_can_be_named() -> None:
    names = {name for name, method in METHODS.items() if method.experts == "checkpoints"}
    assert {entry.name for entry in BaselinesSpec(methods={name: {} for name in sorted(names)}).entries()} == names


@pytest.mark.parametrize(
    ("name", "given", "need"),
    [
        ("ties", {}, "nothing"),
        ("regmean", {}, "unlabelled activations"),
        ("adamerging", {}, "unlabelled batches"),
        ("twin_merging", {}, "task labels"),
        ("bmm", {}, "labelled validation"),
        ("bmm", {"trials": 0}, "unlabelled activations"),
        ("bmm", {"trials": 0, "data_free": True}, "nothing"),
        ("bmm", {"data_free": True}, "labelled validation"),
    ],
)
def test_a_row_needs_what_its_settings_ask_for(name: str, given: dict[str, Any], need: str) -> None:
    entry = entry_of(name, given)
    assert entry.need == need
    assert entry.uses_labels == (need == "labelled validation")
    assert entry.uses_images == (need not in ("nothing", "unlabelled activations"))
    assert entry.uses_activations == (name == "regmean" or (name == "bmm" and not given.get("data_free")))


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"mine": {}}, "no merging method 'mine'"),
        ({"mine": {"method": "tise"}}, "did you mean ties?"),
        ({"bd_mine": {"method": "ties"}}, "rename it, as in `my_ties: {method: ties}`"),
        ({"pretrained": {"method": "ties"}}, "cannot name a method's row"),
        ({"robust_merge": {}}, "merges LoRA adapters, and a run's experts are whole checkpoints"),
        ({"regmean": {"grams": 1}}, "grams of regmean comes from the run's data; leave it out"),
        ({"ties": {"keep": 3}}, "keep=3.0 must lie in (0, 1]"),
        ({"map": {"search": 1}}, "comes from the run's data"),
        ({"map": {"trials": 0}}, "trials=0 must be above 0"),
        ({"map": {"trials": "many"}}, "trials='many' must be of type int, such as 1000"),
        ({"wemoe": {"steps": 1.5}}, "steps=1.5 must be of type int"),
        ({"bmm": {"scale": 0.5}}, "scale are searched in 40 trials; set trials: 0"),
        ({"bmm": {"anchor": "ties"}}, "anchor='ties' must be one of"),
        ({"surgery": {}}, "`after: task_arithmetic` is no row of baselines.methods that gives one model"),
        ({"surgery": {"after": "twin_merging"}, "twin_merging": {}}, "take one of them"),
        ({"surgery": {"after": "ties", "rank": 0}, "ties": {}}, "rank=0 must be at least 1"),
    ],
)
def test_a_fault_says_what_to_do(methods: dict[str, Any], said: str) -> None:
    assert said in fault(**methods)


def test_the_configuration_of_all_methods_names_every_one() -> None:
    path = Path(__file__).parents[2] / "configs" / "all_methods.yaml"
    config = parse(Config, load_yaml(path, ["store=store"]), str(path))
    named = {entry.method.name for entry in config.baselines.entries()}
    assert named == {name for name, method in METHODS.items() if method.experts == "checkpoints"}
