"""The backbone: features as open_clip computes them, tokens of the last block, deterministic, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.backbones.open_clip import Backbone, check_activation, load_backbone, state_sha256
from pipeline.errors import ConfigError, DataError
from pipeline.formats.clip_names import to_open_clip, visual_only

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def backbone(config_path: Path) -> Backbone:
    return load_backbone(config_path, seed=1)


def pictures(count: int, size: tuple[int, int] = (50, 40)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(count)]


def test_preprocessing_in_two_halves_is_open_clips(backbone: Backbone) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    whole = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    images = [*pictures(2), *pictures(1, (8, 8)), pictures(1)[0].convert("L"), pictures(1)[0].convert("RGBA")]
    inputs = np.stack([backbone.to_input(image) for image in images])
    assert inputs.dtype == np.uint8 and inputs.shape == (5, 32, 32, 3)
    assert torch.equal(backbone.normalise(torch.from_numpy(inputs)), torch.stack([whole(image) for image in images]))


def test_normalise_refuses_another_layout(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[B,H,W,3\], got torch.float32 \(1, 3, 32, 32\)"):
        backbone.normalise(torch.zeros(1, 3, 32, 32))


def test_tokens_are_the_last_blocks_with_cls_and_features_are_the_models(backbone: Backbone) -> None:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    blocks = backbone.visual.get_submodule("transformer.resblocks")
    hook = blocks[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        features, pooled = backbone.tokens(images)
        hook.remove()
        expected = nn.functional.normalize(backbone.model.encode_image(images), dim=-1)
    (tokens,) = seen
    assert tokens.shape == (3, 1 + 16, 64) and backbone.width == 64
    assert torch.equal(pooled, tokens.mean(dim=1))
    assert torch.equal(features, expected) and features.shape == (3, backbone.embed_dim)


def test_class_heads_are_mean_prompts(backbone: Backbone) -> None:
    templates = ["a photo of a {}.", "{}"]
    heads = backbone.class_heads(["zero", "north coast"], templates)
    prompts = [template.format("north coast") for template in templates]
    with torch.no_grad():
        texts = backbone.model.encode_text(backbone.tokenise(prompts))
    mean = nn.functional.normalize(texts, dim=-1).mean(dim=0)
    torch.testing.assert_close(heads[1], mean / mean.norm())
    assert not heads.requires_grad
    torch.testing.assert_close(heads.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [([], ["{}"], "no class names"), (["a"], ["a photo"], "must each hold {}"), (["a"], [], "must each hold {}")],
)
def test_heads_need_names_and_templates(
    backbone: Backbone, names: list[str], templates: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        backbone.class_heads(names, templates)


def test_seed_decides_the_weights_and_global_randomness_is_left_alone(config_path: Path, backbone: Backbone) -> None:
    before = torch.random.get_rng_state()
    again, other = load_backbone(config_path, seed=1), load_backbone(config_path, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert again.identity == backbone.identity
    assert other.weights_sha256 != backbone.weights_sha256


def test_state_round_trip_keeps_identity(config_path: Path, backbone: Backbone) -> None:
    loaded = load_backbone(config_path, backbone.model.state_dict(), seed=5)
    assert loaded.identity == backbone.identity
    assert loaded.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)
    assert not loaded.model.training
    reordered = dict(reversed([*backbone.model.state_dict().items()]))
    assert state_sha256(reordered) == backbone.weights_sha256
    renamed = {f"x{name}": value for name, value in reordered.items()}
    assert state_sha256(renamed) != backbone.weights_sha256


def test_state_that_does_not_fit_is_explained(config_path: Path, backbone: Backbone) -> None:
    state = dict(backbone.model.state_dict())
    state["visual.proj"] = torch.zeros(64, 7)
    state["extra"] = torch.zeros(1)
    del state["logit_scale"]
    with pytest.raises(DataError, match=r"3 place(?s:.*)missing logit_scale(?s:.*)extra(?s:.*)\(64, 7\).*\(64, 24\)"):
        load_backbone(config_path, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": None}, "lacks vision_cfg"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "fetched from a hub"),
        ({"vision_cfg": {"timm_model_name": "vit_tiny"}}, "timm_model_name is not supported"),
        ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}}, "ModifiedResNet.*choose a ViT"),
    ],
)
def test_models_that_cannot_be_used_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    config = {key: value for key, value in {**CONFIG, **change}.items() if value is not None}
    (tmp_path / "model.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        load_backbone(tmp_path / "model.json")


def test_unknown_and_unreadable_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'ViT-Q-99' is neither a \.json file nor one of open_clip's"):
        load_backbone("ViT-Q-99")
    with pytest.raises(ConfigError, match=r"nowhere\.json cannot be read"):
        load_backbone(tmp_path / "nowhere.json")
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(ConfigError, match=r"torn\.json is not JSON"):
        load_backbone(tmp_path / "torn.json")


def test_activation_must_be_the_models(config_path: Path) -> None:
    check_activation("ViT-B-32", None, "clip.pt")
    check_activation("ViT-B-32-quickgelu", "quick_gelu", "clip")
    with pytest.raises(ConfigError, match=r"clip was trained with.*'quick_gelu'.*use the model ViT-B-32-quickgelu"):
        check_activation("ViT-B-32", "quick_gelu", "clip")


# -- Hugging Face's layout, against its forward written from the definition --------------------------------------------


def hugging_face_state(backbone: Backbone) -> dict[str, Tensor]:
    """The image tower under the names (and in the layout) of Hugging Face's CLIPModel."""
    state = visual_only(backbone.model.state_dict())
    named = {
        "embeddings.class_embedding": state["class_embedding"],
        "embeddings.patch_embedding.weight": state["conv1.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        "embeddings.position_ids": torch.arange(17)[None],
    }
    for theirs, ours in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        named |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    for layer in range(2):
        block, target = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            for part, value in zip("qkv", state[f"{block}.attn.in_proj_{kind}"].chunk(3), strict=True):
                named[f"{target}.self_attn.{part}_proj.{kind}"] = value
            for theirs, ours in (
                *(("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")),
                *(("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")),
            ):
                named[f"{target}.{theirs}.{kind}"] = state[f"{block}.{ours}.{kind}"]
    return {f"vision_model.{name}": value for name, value in named.items()} | {
        "visual_projection.weight": state["proj"].T,
    }


def hugging_face_features(state: dict[str, Tensor], images: Tensor, heads: int) -> Tensor:
    functional = nn.functional
    weights = {name.removeprefix("vision_model."): value for name, value in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    patches = functional.conv2d(images, weights["embeddings.patch_embedding.weight"], stride=8).flatten(2).mT
    cls = weights["embeddings.class_embedding"].expand(len(images), 1, -1)
    x = torch.cat([cls, patches], dim=1) + weights["embeddings.position_embedding.weight"]
    x = norm(x, "pre_layrnorm")
    for layer in range(2):
        name = f"encoder.layers.{layer}"
        y = norm(x, f"{name}.layer_norm1")
        q, k, v = (linear(y, f"{name}.self_attn.{part}_proj").unflatten(-1, (heads, -1)) for part in "qkv")
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        attended = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        x = x + linear(attended, f"{name}.self_attn.out_proj")
        x = x + linear(functional.gelu(linear(norm(x, f"{name}.layer_norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    return norm(x[:, 0], "post_layernorm") @ state["visual_projection.weight"].T


@pytest.mark.parametrize("newer_names", [False, True])
def test_hugging_face_names_map_to_equal_features(backbone: Backbone, newer_names: bool) -> None:
    state = hugging_face_state(backbone)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(backbone.visual(images), hugging_face_features(state, images, heads=2))
    if newer_names:  # CLIPVisionModel as of transformers 5: no prefix, no projection
        del state["visual_projection.weight"]
        state = {name.removeprefix("vision_model."): value for name, value in state.items()}
    mapped = to_open_clip(state, "folder")
    own = backbone.model.state_dict()
    assert len(mapped) == sum(name.startswith("visual.") for name in own) - newer_names
    for name, value in mapped.items():
        assert torch.equal(value, own[name]), name


def test_torn_hugging_face_state_is_refused(backbone: Backbone) -> None:
    state = hugging_face_state(backbone)
    del state["vision_model.encoder.layers.0.self_attn.k_proj.bias"]
    with pytest.raises(DataError, match=r"incomplete attention .*resblocks\.0\.attn\.in_proj_bias"):
        to_open_clip(state, "folder")
    with pytest.raises(DataError, match=r"unknown tensors \['vision_model\.adapter'\]"):
        to_open_clip({**hugging_face_state(backbone), "vision_model.adapter": torch.zeros(1)}, "folder")
