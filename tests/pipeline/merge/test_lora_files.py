"""LoRA adapters as PEFT saves them, against theta_0 + alpha/r B A written out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bd_core.methods import merge
from pipeline.errors import ConfigError, DataError
from pipeline.merge.run import merge_files
from pipeline.merge.spec import MergeSpec

PREFIX = "base_model.model."
R = 2


def make_base(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "enc.0.q_proj.weight": (6, 8),
        "enc.0.q_proj.bias": (6,),
        "enc.1.q_proj.weight": (6, 8),
        "conv.weight": (4, 3, 2, 2),
        "words.weight": (10, 6),
        "head.weight": (3, 6),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": 6} | config))
    return folder


def linear(seed: int, module: str = "enc.0.q_proj", inputs: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(R, inputs, generator=generator),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(6, R, generator=generator),
    }


def added(base: dict[str, Tensor], **deltas: Tensor) -> dict[str, Tensor]:
    return {name: value + deltas.get(name.replace(".", "_"), 0) for name, value in base.items()}


def run(tmp_path: Path, experts: list[Path], **settings: Any) -> dict[str, Tensor]:
    spec = {"method": "task_arithmetic", "parameters": {"scale": 1.0}} | settings
    spec |= {"base": tmp_path / "base.safetensors", "experts": experts, "output": tmp_path / "out.safetensors"}
    merge_files(MergeSpec.model_validate(spec), force=True)
    return load_file(tmp_path / "out.safetensors")


def test_every_form_of_plain_lora_is_expanded(tmp_path: Path) -> None:
    base = make_base()
    save_file(base, tmp_path / "base.safetensors")
    tensors = linear(1)
    a_conv, b_conv = torch.randn(R, 3, 2, 2), torch.randn(4, R, 1, 1)
    a_word, b_word = torch.randn(R, 10), torch.randn(6, R)
    tensors |= {f"{PREFIX}conv.lora_A.weight": a_conv, f"{PREFIX}conv.lora_B.weight": b_conv}
    tensors |= {f"{PREFIX}words.lora_embedding_A": a_word, f"{PREFIX}words.lora_embedding_B": b_word}
    saved = torch.randn(3, 6)
    tensors[f"{PREFIX}head.modules_to_save.weight"] = saved
    merged = run(tmp_path, [write_adapter(tmp_path / "one", tensors)])
    a, b = (tensors[f"{PREFIX}enc.0.q_proj.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(merged["enc.0.q_proj.weight"], base["enc.0.q_proj.weight"] + 3 * b @ a)
    conv = torch.einsum("or,rikl->oikl", b_conv[:, :, 0, 0], a_conv)
    torch.testing.assert_close(merged["conv.weight"], base["conv.weight"] + 3 * conv)
    torch.testing.assert_close(merged["words.weight"], base["words.weight"] + 3 * (b_word @ a_word).T)
    torch.testing.assert_close(merged["head.weight"], saved)
    for name in ("enc.1.q_proj.weight", "enc.0.q_proj.bias"):
        assert torch.equal(merged[name], base[name])


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"use_rslora": True}, 6 / R**0.5),
        ({"alpha_pattern": {"0.q_proj": 10}}, 10 / R),
        ({"alpha_pattern": {"9.q_proj": 10}}, 6 / R),
        ({"r": 64, "rank_pattern": {"q_proj": R}}, 6 / R),
        ({"fan_in_fan_out": True}, 6 / R),
    ],
)
def test_scalings_of_peft(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    base = make_base()
    if config.get("fan_in_fan_out"):
        base["enc.0.q_proj.weight"] = base["enc.0.q_proj.weight"].T.contiguous()
    save_file(base, tmp_path / "base.safetensors")
    tensors = linear(1)
    merged = run(tmp_path, [write_adapter(tmp_path / "one", tensors, **config)])
    a, b = tensors.values()
    delta = scale * (b @ a)
    delta = delta.T if config.get("fan_in_fan_out") else delta
    torch.testing.assert_close(merged["enc.0.q_proj.weight"], base["enc.0.q_proj.weight"] + delta)


def test_two_adapters_merge_as_the_checkpoints_they_stand_for(tmp_path: Path) -> None:
    base = make_base()
    save_file(base, tmp_path / "base.safetensors")
    one, two = linear(1), linear(2, "enc.1.q_proj")
    paths = [write_adapter(tmp_path / "one", one), write_adapter(tmp_path / "two", two)]
    touched = {name: base[name] for name in ("enc.0.q_proj.weight", "enc.1.q_proj.weight")}
    deltas = [3 * b @ a for a, b in (one.values(), two.values())]
    full = [added(touched, **{f"enc_{k}_q_proj_weight": delta}) for k, delta in enumerate(deltas)]
    # What no adapter changes does not count: the share that Ties keeps is of the adapted weights.
    expected = merge("ties", touched, full, keep=0.3)
    merged = run(tmp_path, paths, method="ties", parameters={"keep": 0.3})
    for name in base:
        torch.testing.assert_close(merged[name], expected.get(name, base[name]))


def test_steps_on_a_half_precision_base_are_not_rounded_before_they_are_summed(tmp_path: Path) -> None:
    base = make_base(torch.bfloat16)
    save_file(base, tmp_path / "base.safetensors")
    tensors = [linear(seed) for seed in range(8)]
    for each in tensors:  # each step alone is lost in bfloat16
        each[f"{PREFIX}enc.0.q_proj.lora_B.weight"] *= 2e-4
    merged = run(tmp_path, [write_adapter(tmp_path / str(k), each) for k, each in enumerate(tensors)])
    step = sum(3 * b @ a for a, b in (each.values() for each in tensors))
    name = "enc.0.q_proj.weight"
    assert merged[name].dtype == torch.bfloat16
    assert torch.equal(merged[name], (base[name].float() + step).bfloat16())


def test_adapters_go_to_robust_merge_as_they_are(tmp_path: Path) -> None:
    base = make_base()
    save_file(base, tmp_path / "base.safetensors")
    tensors = [linear(seed) | linear(10 + seed, "enc.1.q_proj") for seed in (1, 2)]
    paths = [write_adapter(tmp_path / f"{k}", each, lora_alpha=6 + 2 * k) for k, each in enumerate(tensors)]
    merged = run(tmp_path, paths, method="robust_merge", parameters={"keep": 0.5})
    expected = merge("robust_merge", base, tensors, scaling=[3.0, 4.0], keep=0.5)
    for name in base:
        torch.testing.assert_close(merged[name], expected[name])
    save_file(base, tmp_path / "whole.safetensors")
    with pytest.raises(ConfigError, match=r"robust_merge merges LoRA adapters, .*whole\.safetensors is a checkpoint"):
        run(tmp_path, [paths[0], tmp_path / "whole.safetensors"], method="robust_merge", parameters={})
    with pytest.raises(ConfigError, match=r"scaling is read off each adapter_config\.json"):
        run(tmp_path, paths, method="robust_merge", parameters={"scaling": 1.0})


def test_what_is_not_plain_lora_or_not_of_this_base_is_refused(tmp_path: Path) -> None:
    save_file(make_base(), tmp_path / "base.safetensors")
    cases = [
        (linear(1), {"use_dora": True}, "use_dora is not plain LoRA"),
        (linear(1), {"peft_type": "IA3"}, "peft_type IA3 is not plain LoRA"),
        (linear(1, "other.q_proj"), {}, r"changes 1 modules the base has not, first other\.q_proj.*names such as"),
        (linear(1, inputs=9), {}, r"does not fit enc\.0\.q_proj\.weight \[6, 8\]"),
        (linear(1), {"lora_alpha": None}, "not a LoRA adapter's configuration"),
        ({f"{PREFIX}x.lora_A.weight": torch.ones(2, 2)}, {}, "has only one of A and B"),
        ({f"{PREFIX}x.lora_magnitude_vector": torch.ones(2)}, {}, "is not plain LoRA"),
        (
            linear(1) | {f"{PREFIX}classifier.weight": torch.ones(2, 2)},
            {},
            r"\+ classifier\.weight.*only in the expert",
        ),
    ]
    for k, (tensors, config, reason) in enumerate(cases):
        with pytest.raises((DataError, ConfigError), match=f"(?s){reason}"):
            run(tmp_path, [write_adapter(tmp_path / f"case{k}", tensors, **config)])
    (tmp_path / "case0" / "adapter_config.json").write_text("[")
    with pytest.raises(DataError, match="not an adapter's configuration"):
        run(tmp_path, [tmp_path / "case0"])
    (tmp_path / "case1" / "adapter_model.safetensors").unlink()
    (tmp_path / "case1" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds none of adapter_model"):
        run(tmp_path, [tmp_path / "case1"])


@pytest.mark.parametrize("method", ["task_arithmetic", "robust_merge"])
def test_adapters_of_queries_and_values_fit_a_hugging_face_clip(tmp_path: Path, method: str) -> None:
    """open_clip keeps queries, keys and values in one matrix; the adapters change two thirds of it."""
    at = "vision_model.encoder.layers.0.self_attn"
    generator = torch.Generator().manual_seed(0)
    names = [f"{at}.{part}_proj.weight" for part in "qkv"]
    base = {name: torch.randn(6, 8, generator=generator) for name in names}
    save_file(base, tmp_path / "base.safetensors")
    tensors = [linear(seed, f"{at}.q_proj") | linear(9 + seed, f"{at}.v_proj") for seed in (1, 2)]
    paths = [write_adapter(tmp_path / str(k), each) for k, each in enumerate(tensors)]
    merged = run(tmp_path, paths, method=method, parameters={})
    if method == "robust_merge":
        expected = merge("robust_merge", base, tensors, scaling=3.0)
    else:
        full = []
        for each in tensors:
            (qa, qb, va, vb) = each.values()
            full.append(base | {names[0]: base[names[0]] + 3 * qb @ qa, names[2]: base[names[2]] + 3 * vb @ va})
        expected = merge("task_arithmetic", base, full)
    assert merged.keys() == base.keys()
    for name in names:
        torch.testing.assert_close(merged[name], expected[name])
