"""Merged models in every form they are kept in: what they take, what they lose, and that their cards run them."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from cards import run_card
from safetensors.torch import load_file
from terminal import bd_merge
from tiny import CLASSES
from torch.func import functional_call

from bd_core.task_vectors import task_vectors
from pipeline.stages.fitted_router import load_router
from pipeline.stages.merged_files import read_recipe

if TYPE_CHECKING:
    from conftest import Forms

SORTED = {task: sorted(names) for task, names in CLASSES.items()}  # class folders are listed by name
FORMS_AND_MODELS = [
    ("low_rank", "bd_task"),
    ("low_rank", "bd_layer"),
    ("low_rank", "bd_layer_static"),
    ("bfloat16", "bd_layer"),
]


def experts_vectors(forms: "Forms") -> dict[str, torch.Tensor]:
    full = load_file(forms.artefact("whole", "base", "base").file("model.safetensors"))
    base = {name.removeprefix("visual."): value for name, value in full.items() if name.startswith("visual.")}
    states = [load_file(forms.artefact("whole", "experts", task).file("visual.safetensors")) for task in CLASSES]
    return task_vectors(base, states).vectors


@pytest.mark.parametrize(("form", "model"), FORMS_AND_MODELS)
def test_the_card_alone_runs_every_form(forms: "Forms", form: str, model: str, tmp_path: Path) -> None:
    found = forms.clean(form, model, "high")
    names = run_card(forms.artefact(form, "export", model).path, list(found), "high", tmp_path)
    assert names["predictions"] == [SORTED["high"][row["prediction"]] for row in found.values()]
    # In bfloat16, evaluate shared copies among samples whose weights differ by 0.05 at most.
    tolerance = 1e-4 if form == "low_rank" else 2e-2
    confidence = torch.tensor([row["confidence"] for row in found.values()])
    torch.testing.assert_close(names["probabilities"].amax(-1), confidence, rtol=tolerance, atol=tolerance)


def test_whole_float32_vectors_are_kept_as_ever(forms: "Forms") -> None:
    artefact = forms.artefact("whole", "export", "bd_layer")
    assert "vectors" not in read_recipe(artefact.path)
    stored = load_file(artefact.file("task_vectors.safetensors"))
    for name, stacked in experts_vectors(forms).items():
        assert torch.equal(stored[name], stacked), name
    size = artefact.file("task_vectors.safetensors").stat().st_size
    assert artefact.report["metrics"] == {"bytes_per_expert": size // 2}
    assert forms.metrics("whole", "bd_layer")["cost"]["bytes_per_expert"] == size // 2
    assert forms.metrics("whole", "bd_layer")["compared_with_dense"] is None


def test_half_precision_vectors_take_half_and_tell_what_rounding_cost(forms: "Forms") -> None:
    artefact = forms.artefact("bfloat16", "export", "bd_layer")
    stored = load_file(artefact.file("task_vectors.safetensors"))
    kept = read_recipe(artefact.path)["vectors"]
    for name, stacked in experts_vectors(forms).items():
        assert torch.equal(stored[name], stacked.bfloat16()), name
        error = (stacked - stored[name].float()).norm() / stacked.norm()
        assert kept["relative_error"][name] == pytest.approx(error.item(), rel=1e-4)
    assert kept["dtype"] == "bfloat16" and 0 < kept["relative_error_max"] < 2**-8
    whole = forms.artefact("whole", "export", "bd_layer").report["metrics"]["bytes_per_expert"]
    assert kept["bytes_per_expert"] == pytest.approx(whole / 2, rel=0.05)


def test_cut_vectors_are_their_leading_triplets_and_tell_what_is_lost(forms: "Forms") -> None:
    artefact = forms.artefact("low_rank", "export", "bd_layer")
    stored, kept = load_file(artefact.file("task_vectors.safetensors")), read_recipe(artefact.path)["vectors"]
    assert (kept["kind"], kept["rank"], kept["dtype"]) == ("low_rank", 2, "bfloat16")
    cut = [name for name in kept["shapes"] if f"left/{name}" in stored]
    assert cut and len(cut) < len(kept["shapes"])
    for name, tau in experts_vectors(forms).items():
        if name not in cut:
            assert torch.equal(stored[name], tau.bfloat16())
            continue
        matrices = tau.flatten(2)
        restored = torch.bmm(stored[f"left/{name}"].float(), stored[f"right/{name}"].float())
        assert kept["relative_error"][name] == pytest.approx(
            ((matrices - restored).norm() / tau.norm()).item(), rel=1e-4
        )
        singular = torch.linalg.svdvals(matrices)
        best = (singular[:, 2:].square().sum() / singular.square().sum()).sqrt().item()
        assert best <= kept["relative_error"][name] < best + 0.01  # the rest is rounding
    errors = [kept["relative_error"][name] for name in kept["shapes"]]
    assert kept["relative_error_max"] == max(errors) and 0.1 < kept["relative_error_mean"] < max(errors)
    assert kept["bytes_per_expert"] == artefact.file("task_vectors.safetensors").stat().st_size // 2


def test_accuracy_lost_is_that_of_the_exact_model_on_the_same_images(forms: "Forms") -> None:
    cut, whole = forms.metrics("low_rank", "bd_layer"), forms.metrics("whole", "bd_layer")
    assert (cut["mode"], whole["mode"]) == ("low_rank", "exact")
    for protocol, levels in cut["compared_with_dense"].items():
        for level, lost in levels.items():
            mine, exact = (found["protocols"][protocol][level]["mean"]["accuracy"] for found in (cut, whole))
            assert lost == pytest.approx(mine - exact), (protocol, level)
    assert cut["compared_with_dense"].keys() == {"task_known", "task_free"}
    predictions = [forms.clean(form, "bd_layer", "low") for form in ("low_rank", "whole")]
    first, second = ([row["confidence"] for row in found.values()] for found in predictions)
    assert first != pytest.approx(second, abs=1e-4)  # the cut model was run, not the exact one twice
    # The baselines are whole, and nothing is compared for them.
    assert forms.metrics("low_rank", "twin_merging")["compared_with_dense"] is None


def test_shared_copies_tell_their_bound(forms: "Forms") -> None:
    found = forms.metrics("bfloat16", "bd_layer")
    assert found["mode"] == "grouped" and found["grouped"]["distance"] == 0.05
    bound = found["grouped"]["weight_error_bound"]
    for name, tau in experts_vectors(forms).items():
        assert bound[name] == pytest.approx(0.05 * tau.flatten(1).norm(dim=1).max().item(), rel=1e-2)
    assert forms.metrics("whole", "bd_layer")["grouped"] is None


@pytest.mark.parametrize("variant", ["task", "layer"])
def test_a_static_model_is_the_merge_with_the_mean_weights(forms: "Forms", variant: str) -> None:
    import numpy as np

    artefact = forms.artefact("low_rank", "export", f"bd_{variant}_static")
    recipe = read_recipe(artefact.path)
    named = {"task": "task-wise", "layer": "layer-wise"}[variant]
    assert recipe["title"] == f"BD-Merging ({named}), static" and recipe["kind"] == "static"
    router, _ = load_router(forms.artefact("low_rank", "fit_router", variant))
    shards = [path for path in sorted((forms.store / "embed").iterdir()) if not path.name.startswith(".")]
    tokens = torch.from_numpy(np.concatenate([np.load(path / "tokens.npy") for path in shards]))
    with torch.no_grad():
        mean_GK = router(tokens).mean(0)
    torch.testing.assert_close(torch.tensor(recipe["mean_weights"]), mean_GK)
    group_of = read_recipe(forms.artefact("low_rank", "export", f"bd_{variant}").path)["group_of"]
    base = load_file(forms.artefact("low_rank", "export", f"bd_{variant}").file("base.safetensors"))
    merged = load_file(artefact.file("visual.safetensors"))
    assert merged.keys() == base.keys()
    for name, tau in experts_vectors(forms).items():
        step = torch.tensordot(mean_GK[group_of[name]], tau, dims=1)
        torch.testing.assert_close(merged[name], base[name] + step, rtol=1e-5, atol=1e-6)
    # A row like any other, and the file is a plain checkpoint of the tower.
    assert forms.metrics("low_rank", f"bd_{variant}_static")["title"] == recipe["title"]
    from pipeline.stages.models import open_backbone

    tower = open_backbone(forms.artefact("low_rank", "base", "base")).visual
    assert functional_call(tower, merged, (torch.zeros(1, 3, 32, 32),)).shape == (1, 16)


def test_the_page_tells_sizes_errors_and_losses(forms: "Forms") -> None:
    page = forms.artefact("low_rank", "report", "report").file("report.html").read_text(encoding="utf-8")
    kept = read_recipe(forms.artefact("low_rank", "export", "bd_layer").path)["vectors"]
    assert f"{kept['bytes_per_expert'] / 2**20:.2f} MiB an expert on disk" in page
    assert f"relative error {100 * kept['relative_error_mean']:.1f} % on average" in page
    assert "against whole task vectors" in page and "BD-Merging (layer-wise), static" in page


def test_the_other_form_costs_its_export_and_what_follows(forms: "Forms") -> None:
    whole = forms.artefact("whole", "fit_router", "layer").key
    assert forms.artefact("low_rank", "fit_router", "layer").key == whole
    ended = bd_merge("plan", forms.config, "export.static=true")
    assert ended.exit_code == 0
    line = next(line for line in ended.output.splitlines() if "│ export" in line)
    assert [cell.strip() for cell in line.split("│")][2:4] == ["0", "4"]  # both forms are in the store


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["export.vectors.kind=low_rank"], "exactly one of rank, rank_share and energy (none is given)"),
        (["export.vectors={kind: low_rank, rank: 2, energy: 0.9}"], "(rank=2 and energy=0.9)"),
        (["export.vectors.kind=lowrank"], "did you mean 'low_rank'?"),
        (["export.vectors={kind: low_rank, rank_share: 1.5}"], "export.vectors.rank_share"),
        (["export.vectors={kind: dense, dtype: float16}"], "export.vectors.dtype"),
        (["export.vectors={kind: dense, rank: 2}"], "export.vectors.rank: unknown key"),
        (["evaluate.grouped_distance=0"], "evaluate.grouped_distance"),
    ],
)
def test_options_that_cannot_be_meant(forms: "Forms", options: list[str], told: str) -> None:
    ended = bd_merge("plan", forms.config, *options)
    assert ended.is_clear_refusal and told in ended.output, ended.output
