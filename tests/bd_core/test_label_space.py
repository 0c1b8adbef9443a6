"""The union of the tasks' classes and its head. Shapes: C classes, D width."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from bd_core.label_space import LabelSpace, canonical_name, unify_heads, unify_labels

OVERLAPPING = {"land": ["Annual-Crop", "Forest"], "places": ["forest", "river", "annual_crop"], "digits": ["0", "1"]}
names = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8, unique=True)


def test_shared_names_become_one_class() -> None:
    space = unify_labels(OVERLAPPING)
    assert space.classes == ("annual crop", "forest", "river", "0", "1")
    assert space.maps == {"land": (0, 1), "places": (1, 2, 0), "digits": (3, 4)}
    assert space.n_classes == 5


def test_concatenate_keeps_every_class_apart() -> None:
    space = unify_labels(OVERLAPPING, union="concatenate")
    assert space.n_classes == 7
    assert space.classes[:3] == ("land/annual crop", "land/forest", "places/forest")
    assert space.maps["places"] == (2, 3, 4)


def test_canonical_name() -> None:
    assert canonical_name("  Annual__Crop-LAND ") == "annual crop land"
    assert canonical_name("STRASSE") == canonical_name("Straße")


@given(st.dictionaries(st.sampled_from(["t1", "t2", "t3"]), names, min_size=1))
def test_every_local_class_finds_its_name(tasks: dict[str, list[str]]) -> None:
    space = unify_labels(tasks)
    assert set(space.classes) == {name for local in tasks.values() for name in local}
    for task, local in tasks.items():
        assert [space.classes[column] for column in space.maps[task]] == local
    assert unify_labels(tasks, "concatenate").n_classes == sum(len(local) for local in tasks.values())


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "no task was given"),
        ({"a": []}, "'a' has class names .*name every class|give every class"),
        ({"a": ["x", " "]}, "give every class a name|name every class"),
        ({"a": ["Forest", "forest"]}, "two classes called 'forest' .*rename one"),
    ],
)
def test_bad_names_are_refused(tasks: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unify_labels(tasks)


def test_bad_union_or_space_is_refused() -> None:
    with pytest.raises(ValueError, match=r"union = 'sum' is unknown; choose one of by_name, concatenate"):
        inspect.unwrap(unify_labels)({"a": ["x"]}, "sum")
    with pytest.raises(ValueError, match=r"maps\['a'\] = \(0, 5\)"):
        LabelSpace(classes=("x", "y"), maps={"a": (0, 5)})
    with pytest.raises(ValueError, match="distinct classes"):
        LabelSpace(classes=("x", "x"), maps={"a": (0, 1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unified_head_is_the_mean_of_unit_rows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    space = unify_labels(OVERLAPPING)
    heads = {
        task: torch.randn(len(local), 6, dtype=dtype, generator=generator) * 100 for task, local in OVERLAPPING.items()
    }
    found = unify_heads(heads, space)
    assert found.dtype == dtype
    for column in range(space.n_classes):
        rows = [
            heads[task][local] / heads[task][local].norm()
            for task, columns in space.maps.items()
            for local, unified in enumerate(columns)
            if unified == column
        ]
        mean = sum(rows) / len(rows)
        torch.testing.assert_close(found[column], mean / mean.norm())


def test_one_task_keeps_its_directions() -> None:
    head = torch.eye(3)[[2, 0, 1]] * 5
    torch.testing.assert_close(unify_heads({"a": head}, unify_labels({"a": ["x", "y", "z"]})), normalize(head, dim=1))


def test_bad_heads_are_refused() -> None:
    space = unify_labels({"a": ["x", "y"], "b": ["x"]})
    good = {"a": torch.eye(2), "b": torch.tensor([[1.0, 0.0]])}
    with pytest.raises(ValueError, match=r"heads for \['a'\], space has \['a', 'b'\]"):
        unify_heads({"a": good["a"]}, space)
    with pytest.raises(ValueError, match=r"head of 'a' has shape \(3, 2\), needs \(2, 2\)"):
        unify_heads(good | {"a": torch.ones(3, 2)}, space)
    with pytest.raises(ValueError, match=r"head of 'b', row 0, has norm 0.0"):
        unify_heads(good | {"b": torch.zeros(1, 2)}, space)
    with pytest.raises(ValueError, match=r"head of 'b', row 0, has norm nan"):
        unify_heads(good | {"b": torch.full((1, 2), torch.nan)}, space)
    with pytest.raises(ValueError, match=r"mean head, row 0, has norm 0.0"):
        unify_heads(good | {"b": -good["b"]}, space)
