"""`bd-merge predict`: an exported model on images, from its directory alone, with the numbers that evaluate found."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from terminal import Ended, bd_merge
from tiny import CLASSES

if TYPE_CHECKING:
    from conftest import Forms

SORTED = {task: sorted(names) for task, names in CLASSES.items()}


def called(ended: Ended) -> list[dict[str, Any]]:
    """The JSON lines among what was printed."""
    assert ended.exit_code == 0, ended.output
    return [json.loads(line) for line in ended.output.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("form", ["whole", "low_rank"])
def test_predictions_are_those_of_evaluate_wherever_the_artefact_lies(
    forms: "Forms", form: str, tmp_path: Path
) -> None:
    expected = forms.clean(form, "bd_layer", "high")
    directory = shutil.copytree(forms.artefact(form, "export", "bd_layer").path, tmp_path / "elsewhere")
    images = [str(image) for image in expected]
    nowhere = ["--output", "-", "--store", tmp_path / "no-store"]
    known = called(bd_merge("predict", directory, *images, "--task", "high", *nowhere))
    free = called(bd_merge("predict", directory, *images, "--batch-size", 3, *nowhere))
    classes = json.loads((directory / "head.json").read_text())["classes"]
    scores = pq.read_table(forms.artefact(form, "detect", "detect").file("scores.parquet")).to_pylist()
    u = {row["sample_id"]: row["u"] for row in scores if (row["task"], row["level"]) == ("high", "clean")}
    confidences = [row["confidence"] for row in expected.values()]
    assert max(confidences) - min(confidences) > 1e-3  # so that a constant answer would be seen
    for row, one, other in zip(expected.values(), known, free, strict=True):
        assert one["prediction"] == SORTED["high"][row["prediction"]]
        assert one["probability"] == pytest.approx(row["confidence"], abs=1e-5)
        assert other["prediction"] == classes[row["prediction_free"]]
        assert other["probability"] == pytest.approx(row["confidence_free"], abs=1e-5)
        mean = [sum(row["weights"][k::2]) / (len(row["weights"]) // 2) for k in range(2)]
        assert other["weights"] == pytest.approx(dict(zip(CLASSES, mean, strict=True)), abs=1e-5)
        assert other["uncertainty"] == pytest.approx(u[row["sample_id"]], abs=1e-5)
        assert other["mode"] == {"whole": "exact", "low_rank": "low_rank"}[form] and other["reject"] is None


@pytest.mark.parametrize(("form", "model"), [("low_rank", "bd_task_static"), ("whole", "twin_merging")])
def test_models_without_router_or_head_say_so_by_nothing(forms: "Forms", form: str, model: str) -> None:
    expected = forms.clean(form, model, "low")
    options = ["--store", forms.store, "--run", forms.runs[form], "--task", "low", "--output", "-"]
    rows = called(bd_merge("predict", model, *expected, *options))
    for row, found in zip(expected.values(), rows, strict=True):
        assert found["prediction"] == SORTED["low"][row["prediction"]]
        assert found["probability"] == pytest.approx(row["confidence"], abs=1e-5)
        assert found["uncertainty"] is None
        assert (found["weights"] is None, found["mode"] == "static") == (model == "bd_task_static",) * 2


def test_files_that_are_no_images_are_rows_with_a_reason(forms: "Forms", tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    (folder / "below").mkdir(parents=True)
    (good,) = list(forms.clean("whole", "bd_layer", "low"))[:1]
    shutil.copy(good, folder / "below" / "good.png")
    (folder / "cut.png").write_bytes(good.read_bytes()[:60])
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden").write_text("left alone")
    target = tmp_path / "called.parquet"
    ended = bd_merge("predict", "bd_layer", folder, "--store", forms.store, "--output", target)
    assert ended.exit_code == 0 and "rows=3 rejected=2" in ended.output
    rows = {Path(row["path"]).name: row for row in pq.read_table(target).to_pylist()}
    assert rows.keys() == {"good.png", "cut.png", "notes.txt"}
    good_row = rows["good.png"]
    assert good_row["reject"] is None and good_row["weight_low"] + good_row["weight_high"] == pytest.approx(1)
    assert "not an image" in rows["notes.txt"]["reject"] and rows["cut.png"]["prediction"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["called.parquet", "mixed"]
    # Nothing but rejects is no error either.
    ended = bd_merge("predict", "bd_layer", folder / "notes.txt", "--store", forms.store)
    assert ended.exit_code == 0 and "0 predicted, 1 rejected" in ended.output


def test_the_table_is_for_reading(forms: "Forms") -> None:
    images = list(forms.clean("whole", "bd_layer", "low"))[:2]
    ended = bd_merge("predict", "bd_layer", *images, "--store", forms.store, "--run", forms.runs["whole"])
    assert ended.exit_code == 0 and "BD-Merging (layer-wise), exact" in ended.output
    assert "uncertainty" in ended.output and "low 0." in ended.output and "2 predicted, 0 rejected" in ended.output


def test_shared_copies_are_near_the_exact_ones_and_tell_how_near(forms: "Forms", tmp_path: Path) -> None:
    images = list(forms.clean("whole", "bd_layer", "low"))
    store = ["--store", forms.store, "--run", forms.runs["whole"]]
    exact = called(bd_merge("predict", "bd_layer", *images, *store, "--output", "-"))
    grouped = ["--mode", "grouped", "--max-distance", "0.01"]
    target = tmp_path / "grouped.jsonl"
    assert bd_merge("predict", "bd_layer", *images, *store, *grouped, "--output", target).exit_code == 0
    shared = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["mode"] for row in shared] == ["grouped"] * len(images)
    near = pytest.approx([row["probability"] for row in exact], abs=0.02)
    assert [row["probability"] for row in shared] == near
    ended = bd_merge("predict", "bd_layer", images[0], *store, *grouped)
    assert "no parameter lies further than" in ended.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bd_layr", "IMAGE", "--store", "STORE"], "did you mean 'bd_layer'?"),
        (["zebra", "IMAGE", "--store", "STORE"], "it has twin_merging, bd_layer, bd_task"),
        (["bd_layer", "IMAGE", "--store", "STORE/gone"], "STORE/gone does not exist"),
        (["EMPTY", "IMAGE", "--store", "STORE"], "has no merged model 'EMPTY'; it has"),
        (["bd_layer", "IMAGE", "--store", "STORE", "--run", "zz"], "no record matches 'zz'"),
        (["bd_layer", "IMAGE", "--store", "STORE", "--task", "hig"], "did you mean 'high'?"),
        (["bd_layer", "IMAGE", "--store", "STORE", "--task", "zebra"], "it knows low, high."),
        (["bd_layer", "gone.png", "--store", "STORE"], "image gone.png does not exist"),
        (["bd_layer", "EMPTY", "--store", "STORE"], "no file is there"),
        (["bd_layer", "IMAGE", "--store", "EMPTY"], "holds no run"),
        (["./gone", "IMAGE"], "./gone does not exist: name a merged model of a run"),
        (["./EMPTY", "IMAGE"], "holds no recipe.json"),
        (["bd_layer", "IMAGE", "--store", "STORE", "--output", "x.csv"], "ends in .parquet or .jsonl"),
        (["bd_layer", "IMAGE", "--store", "STORE", "--output", "gone/x.jsonl"], "gone does not exist"),
        (["bd_task_static", "IMAGE", "--store", "STORE", "--run", "RUN", "--mode", "exact"], "leave --mode out"),
        (["BROKEN", "IMAGE"], "not a complete exported model"),
        (["OTHER", "IMAGE"], "not a complete exported model"),
    ],
)
def test_mistakes_are_told_with_the_next_step(
    forms: "Forms", arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    broken = shutil.copytree(forms.artefact("whole", "export", "bd_layer").path, tmp_path / "broken")
    (broken / "base.safetensors").write_bytes(b"cut")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "recipe.json").write_text("[]")
    (tmp_path / "other" / "classes.json").write_text("{}")
    image = next(iter(forms.clean("whole", "bd_layer", "low")))
    known = {
        "IMAGE": image,
        "STORE": forms.store,
        "EMPTY": "empty",
        "BROKEN": "broken",
        "OTHER": "other",
        "RUN": forms.runs["low_rank"],
    }

    def put(text: str) -> str:
        for name, value in known.items():
            text = text.replace(name, str(value))
        return text

    ended = bd_merge("predict", *map(put, arguments))
    assert ended.is_clear_refusal and put(told) in ended.output, ended.output
