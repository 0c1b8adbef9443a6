"""Merging files: equal to merging in memory whatever the files are, and the same every time."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import Models, assert_same, make_state, out, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bd_core.methods import METHODS, merge
from pipeline.errors import ConfigError
from pipeline.merge.assign import make_plan
from pipeline.merge.memory import working_set
from pipeline.merge.run import merge_files
from pipeline.merge.spec import MergeSpec

STATIC = [name for name, method in METHODS.items() if method.from_files and method.experts == "checkpoints"]


@pytest.mark.parametrize("method", STATIC)
def test_every_file_method_gives_what_it_gives_in_memory(models: Models, method: str) -> None:
    run(models, method=method)
    # In the order of names, as files are merged: random methods draw by it.
    base = {name: models.base[name] for name in sorted(models.base) if models.base[name].is_floating_point()}
    experts = [{name: expert[name] for name in base} for expert in models.experts]
    assert_same(out(models), models.base | merge(method, base, experts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_run_in_float32_and_are_cast_once(tmp_path: Path, dtype: torch.dtype) -> None:
    models = Models(tmp_path)
    base = make_state(dtype=dtype)
    experts = [make_state(seed, base) for seed in range(8)]
    models.save("base", base)
    names = [models.save(str(k), state).stem for k, state in enumerate(experts)]
    run(models, *names)
    assert_same(out(models), merge("task_arithmetic", base, experts))


@pytest.mark.parametrize(
    "kinds", [("pt", "safetensors"), ("safetensors", "pt"), ("pt", "old.pt"), ("folder", "shards")]
)
def test_inputs_of_different_forms_merge_alike(models: Models, kinds: tuple[str, str]) -> None:
    paths = []
    for kind, name, state in zip(
        (*kinds, kinds[1]), ("base", "a", "b"), (models.base, *models.experts[:2]), strict=True
    ):
        path = models.folder / f"{name}.{kind}"
        if kind.endswith("pt"):
            torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=kind == "pt")
        elif kind == "safetensors":
            path = models.path(name)
        else:
            _write_folder(path, state, shards=2 if kind == "shards" else 1)
        paths.append(path)
    run(models, base=paths[0], experts=paths[1:])
    assert_same(out(models), merge("task_arithmetic", models.base, models.experts[:2]))


def _write_folder(path: Path, state: dict[str, Tensor], shards: int) -> None:
    path.mkdir()
    (path / "config.json").write_text('{"hidden": 8}')
    (path / ".cache").mkdir()
    if shards == 1:
        save_file(state, path / "model.safetensors")
        return
    parts = {f"model-{k}.safetensors": list(state)[k::shards] for k in range(shards)}
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, path / name)
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("shards", [1, 2])
def test_a_folder_comes_out_as_the_base_is_laid_out(models: Models, shards: int) -> None:
    _write_folder(models.folder / "base", models.base, shards)
    target = models.folder / "merged"
    done = run(models, base=models.folder / "base", output=target)
    expected = sorted(path.name for path in (models.folder / "base").iterdir() if path.is_file())
    assert sorted(path.name for path in target.iterdir()) == expected
    found = {key: value for path in target.glob("*.safetensors") for key, value in load_file(path).items()}
    assert_same(found, merge("task_arithmetic", models.base, models.experts))
    assert done.manifest_path == models.folder / "merged.json"
    with pytest.raises(ConfigError, match=r"merged exists.*--force"):
        run(models, base=models.folder / "base", output=target)
    run(models, base=models.folder / "base", output=target, force=True)
    assert [path.name for path in models.folder.glob(".*")] == []
    with pytest.raises(ConfigError, match="is no folder to lay it out as"):
        run(models, output=models.folder / "other")


def test_a_torch_file_comes_out_for_a_torch_suffix(models: Models) -> None:
    run(models, output=models.folder / "out.pt")
    found = torch.load(models.folder / "out.pt", weights_only=True)
    assert list(found) == list(load_file(models.path("base")).keys()) or found.keys() == models.base.keys()
    assert_same(found, merge("task_arithmetic", models.base, models.experts))


def test_hugging_face_clip_merges_with_open_clip_and_comes_out_under_its_own_names(tmp_path: Path) -> None:
    clip, mine = _clip(0)
    theirs, expert = _clip(1)
    save_file(clip, tmp_path / "hf.safetensors")
    save_file({name: value.contiguous() for name, value in expert.items()}, tmp_path / "oc.safetensors")
    save_file(mine, tmp_path / "oc_base.safetensors")
    save_file(theirs, tmp_path / "hf_expert.safetensors")
    results = {}
    for base in ("hf", "oc_base"):
        for other in ("oc", "hf_expert"):
            spec = {"method": "ties", "base": tmp_path / f"{base}.safetensors", "output": tmp_path / "out.safetensors"}
            merge_files(MergeSpec.model_validate({**spec, "experts": [tmp_path / f"{other}.safetensors"]}), force=True)
            results[base, other] = load_file(tmp_path / "out.safetensors")
    expected = merge("ties", mine, [expert])
    for other in ("oc", "hf_expert"):
        assert_same(results["oc_base", other], expected)
        found = results["hf", other]
        assert found.keys() == clip.keys()
        assert torch.equal(found["vision_model.embeddings.position_ids"], torch.arange(3)[None])
        q, k, v = (found[f"vision_model.encoder.layers.0.self_attn.{part}_proj.weight"] for part in "qkv")
        torch.testing.assert_close(torch.cat([q, k, v]), expected["visual.transformer.resblocks.0.attn.in_proj_weight"])
        torch.testing.assert_close(found["visual_projection.weight"].T, expected["visual.proj"])


def _clip(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One tiny image tower under Hugging Face's names, and under open_clip's."""
    generator = torch.Generator().manual_seed(seed)
    theirs, ours, block = {}, {}, "visual.transformer.resblocks.0"
    for name, own, shape in (
        ("vision_model.embeddings.class_embedding", "visual.class_embedding", (4,)),
        ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight", (4, 3, 2, 2)),
        ("vision_model.post_layernorm.weight", "visual.ln_post.weight", (4,)),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", f"{block}.mlp.c_fc.weight", (8, 4)),
    ):
        theirs[name] = ours[own] = torch.randn(shape, generator=generator)
    parts = [torch.randn(4, 4, generator=generator) for _ in range(3)]
    for part, value in zip("qkv", parts, strict=True):
        theirs[f"vision_model.encoder.layers.0.self_attn.{part}_proj.weight"] = value
    ours[f"{block}.attn.in_proj_weight"] = torch.cat(parts)
    theirs["visual_projection.weight"] = torch.randn(3, 4, generator=generator)
    ours["visual.proj"] = theirs["visual_projection.weight"].T.contiguous()
    theirs["vision_model.embeddings.position_ids"] = torch.arange(3)[None]
    return theirs, ours


def test_the_same_merge_gives_the_same_bytes_and_leaves_its_inputs(models: Models) -> None:
    before = {path.name: path.read_bytes() for path in models.folder.glob("*.safetensors")}
    first = run(models, method="dare", seed=3)
    once = (models.folder / "out.safetensors").read_bytes()
    run(models, method="dare", seed=3, force=True)
    assert (models.folder / "out.safetensors").read_bytes() == once
    assert {name: (models.folder / name).read_bytes() for name in before} == before
    run(models, method="dare", seed=4, force=True)
    assert (models.folder / "out.safetensors").read_bytes() != once
    assert first.manifest["seed"] == first.manifest["groups"][0]["parameters"]["seed"] == 3


def test_the_manifest_tells_the_merge(models: Models) -> None:
    done = run(models, "a", "b", method="ties", parameters={"keep": 0.5}, exclude=["table"])
    manifest = json.loads((models.folder / "out.safetensors.json").read_text())
    assert manifest == done.manifest

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert manifest["base"]["files"][0]["sha256"] == digest(models.path("base"))
    assert [e["files"][0]["sha256"] for e in manifest["experts"]] == [digest(models.path(name)) for name in "ab"]
    assert manifest["output"]["files"][0]["sha256"] == digest(models.folder / "out.safetensors")
    assert manifest["groups"][0]["parameters"] == METHODS["ties"].defaults | {"keep": 0.5}
    assert manifest["tensors"] == {"merged": 3, "copied": {"excluded by table": 1, "integer or boolean": 2}}
    assert manifest["seconds"] > 0 and manifest["memory"]["peak_bytes"] > 0 and "torch" in manifest["versions"]
    with safe_open(models.folder / "out.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["bd_merge"])["method"] == "ties"


def test_patterns_and_groups(models: Models) -> None:
    run(
        models,
        include=["layers.*"],
        exclude=["*.bias"],
        parameters={"scale": 1.0},
        groups={"layers.0.*": {"scale": 0.5}},
    )
    found = out(models)
    full = merge("task_arithmetic", models.base, models.experts, scale=1.0)
    half = merge("task_arithmetic", models.base, models.experts, scale=0.5)
    expected = models.base | {"layers.0.weight": half["layers.0.weight"], "layers.1.weight": full["layers.1.weight"]}
    assert_same(found, expected)
    with pytest.raises(ConfigError, match=r"'layer\.\*' fits no tensor.*its names are such as"):
        run(models, include=["layer.*"], force=True)
    with pytest.raises(ConfigError, match="nothing is left to merge"):
        run(models, exclude=["*"], force=True)


@pytest.mark.parametrize("method", STATIC)
@pytest.mark.parametrize("experts", ["single", "identical", "zero"])
def test_degenerate_experts_give_no_nan(models: Models, method: str, experts: str) -> None:
    models.save("same", models.base)
    names = {"single": ["a"], "identical": ["a", "a"], "zero": ["same", "same"]}[experts]
    run(models, *names, method=method)
    found = out(models)
    assert all(bool(value.isfinite().all()) for value in found.values() if value.is_floating_point())
    if experts == "zero":
        assert_same(found, models.base)


def test_the_working_set_does_not_grow_with_the_model_and_little_with_experts(models: Models) -> None:
    wide = {f"layer.{k}": torch.zeros(300, 300) for k in range(40)}
    models.save("base", wide)
    models.save("a", wide)

    def needed(count: int, **settings: Any) -> int:
        given = {"method": "task_arithmetic", "base": models.path("base"), "experts": [models.path("a")] * count}
        return working_set(make_plan(MergeSpec.model_validate(given | settings))).bytes

    model = 40 * 300 * 300 * 4
    assert needed(32) - needed(2) < 4 * 31 * 2 * 300 * 300 * 4
    assert needed(8) < 3 * model + (32 << 20)
    assert needed(2, output=models.folder / "o.pt") - needed(2) == model


def test_random_methods_draw_alike_whatever_the_files_are(models: Models) -> None:
    run(models, method="dare")
    once = out(models)
    torch.save(dict(reversed(models.base.items())), models.folder / "base.pt")
    run(models, method="dare", base=models.folder / "base.pt", force=True)
    assert_same(out(models), once)
