"""open_clip models as backbones: built from a configuration, filled from a state dict, nothing fetched from a hub.

Shape letters: B batch, C classes, D embedding width, W token width, H image height, S side of the square model input.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

import pipeline.backbones.torchvision_ops  # noqa: F401  must come before the first import of open_clip
from pipeline.errors import ConfigError, DataError

SHOWN = 20  # differences; the rest is counted


@dataclass(frozen=True)
class Backbone:
    """An open_clip model in eval mode with all it takes to use and to name it. Experts differ in `visual` only."""

    name: str
    model: nn.Module
    width: int  # of the tokens
    embed_dim: int  # of the features
    input_size: int
    preprocess: Mapping[
        str, Any
    ]  # open_clip's own names: size, mode, mean, std, interpolation, resize_mode, fill_color
    weights_sha256: str
    _resize: Any = field(repr=False)
    _tokenizer: Any = field(repr=False)

    @property
    def visual(self) -> nn.Module:
        """The image tower: float [B,3,S,S] -> features [B,D], not normalised."""
        visual: nn.Module = self.model.get_submodule("visual")
        return visual

    @property
    def identity(self) -> dict[str, Any]:
        """Name, weights and preprocessing: two backbones with equal identity give equal features."""
        return {"name": self.name, "weights_sha256": self.weights_sha256, "preprocess": dict(self.preprocess)}

    @property
    def logit_scale(self) -> float:
        """The learned factor on cosines (already exponentiated)."""
        return float(self.model.get_parameter("logit_scale").detach().exp())

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """L2-normalised features [B,D] and the mean over the last block's tokens, CLS included [B,W].

        `images` is float [B,3,S,S] as `normalise` gives it. The tokens are taken before the final layer norm.
        """
        visual: Any = self.visual
        # indices=1: open_clip counts from the end, so this is the last block alone.
        seen = visual.forward_intermediates(images, indices=1, output_fmt="NLC", output_extra_tokens=True)
        patches, prefix = seen["image_intermediates"][-1], seen["image_intermediates_prefix"][-1]
        pooled = torch.cat([prefix, patches], dim=1).mean(dim=1)
        return nn.functional.normalize(seen["image_features"], dim=-1), pooled

    def to_input(self, image: Image.Image) -> NDArray[np.uint8]:
        """`image` at the model's input size, uint8 [S,S,3] RGB: open_clip's eval transform up to the tensor."""
        return np.array(self._resize(image), dtype=np.uint8)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B,H,W,3] -> float [B,3,H,W], the remaining half of open_clip's eval transform."""
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"pixels must be uint8 [B,H,W,3], got {pixels.dtype} {tuple(pixels.shape)}; use to_input")
        scaled = pixels.permute(0, 3, 1, 2).contiguous().float().div_(255.0)
        mean, std = (torch.tensor(self.preprocess[key], device=pixels.device)[:, None, None] for key in ("mean", "std"))
        return scaled.sub_(mean).div_(std)

    def tokenise(self, texts: Sequence[str]) -> Tensor:
        """Token ids [B, context] of `texts`, on the model's device."""
        ids: Tensor = self._tokenizer(list(texts))
        return ids.to(self.model.get_parameter("logit_scale").device)

    @torch.no_grad()
    def class_heads(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Zero-shot heads [C,D]: L2-normalised mean of the normalised text embeddings of every filled template."""
        if not class_names:
            raise ConfigError("no class names were given, so there are no prompts to make heads of; name the classes")
        broken = [template for template in templates if "{}" not in template]
        if broken or not templates:
            raise ConfigError(f"prompt templates {list(templates)!r} must each hold {{}} for the class name")
        model: Any = self.model
        heads = []
        for name in class_names:
            texts = self.tokenise([template.format(name) for template in templates])
            heads.append(nn.functional.normalize(model.encode_text(texts, normalize=True).mean(dim=0), dim=-1))
        return torch.stack(heads)


def load_backbone(model_config: str | Path, state: Mapping[str, Tensor] | None = None, *, seed: int = 0) -> Backbone:
    """The model that `model_config` describes, holding `state`; without a state it is initialised from `seed`.

    `model_config` is a JSON file in open_clip's form, or the name of one of open_clip's own models. A state must fill
    the whole model. Raises ConfigError for a model that cannot be built here, DataError for a state that does not fit.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    name, config, preprocess = read_model_config(model_config)
    # The global generator is the only one open_clip's constructors know: seed it inside a fork and leave it as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _construct(name, config)
    if state is not None:
        check_fit(state, model.state_dict(), name)
        model.load_state_dict(dict(state))
    settings = merge_preprocess_dict(PreprocessCfg(size=config["vision_cfg"].get("image_size", 224)), preprocess)
    side = settings["size"] if isinstance(settings["size"], int) else settings["size"][0]
    context = config["text_cfg"].get("context_length", 77)
    return Backbone(
        name=name,
        model=model.eval(),
        width=model.visual.transformer.width,
        embed_dim=config["embed_dim"],
        input_size=side,
        preprocess=json.loads(json.dumps(settings)),
        weights_sha256=state_sha256(model.state_dict()),
        _resize=input_transform(settings),
        _tokenizer=open_clip.SimpleTokenizer(context_length=context),
    )


def model_header(model_config: str | Path) -> dict[str, Tensor]:
    """The model's state dict as meta tensors, names, shapes and dtypes: built without a single weight."""
    name, config, _ = read_model_config(model_config)
    with torch.device("meta"):
        state: dict[str, Tensor] = _construct(name, config).state_dict()
    return state


def input_size(model_config: str | Path) -> int:
    """S, the side of the model's input in pixels."""
    _, config, preprocess = read_model_config(model_config)
    size = preprocess.get("size", config["vision_cfg"].get("image_size", 224))
    return int(size if isinstance(size, int) else size[0])


def _construct(name: str, config: Mapping[str, Any]) -> Any:
    import open_clip

    settings = {key: value for key, value in config.items() if key != "custom_text"}
    constructor = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    try:
        model = constructor(**settings)
    except (TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"model {name!r} cannot be built from its configuration ({reason}); correct it") from None
    if not isinstance(model.visual, open_clip.transformer.VisionTransformer):
        raise ConfigError(
            f"model {name!r}: its image tower is a {type(model.visual).__name__}, without the transformer blocks that "
            "the router reads; choose a ViT"
        )
    return model


def input_transform(preprocess: Mapping[str, Any]) -> Any:
    """What brings an image to the model's input size (PIL in, PIL out): open_clip's eval transform, its first half."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
    return type(transform)(transform.transforms[:-2])  # without ToTensor and Normalize: `normalise` does both


def read_model_config(model_config: str | Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name, model configuration and preprocessing overrides of a JSON file or of one of open_clip's own models.

    A file may be open_clip's flat model configuration, or {"model_cfg": ..., "preprocess_cfg": ...} as it saves them.
    """
    path = Path(model_config)
    if path.suffix != ".json":
        return _builtin(str(model_config))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"model configuration {path} cannot be read ({error.strerror}); correct the path") from None
    except ValueError as error:
        raise ConfigError(f"model configuration {path} is not JSON ({error}); correct the file") from None
    config = data.get("model_cfg", data) if isinstance(data, dict) else {}
    for key, kind in (("embed_dim", int), ("vision_cfg", dict), ("text_cfg", dict)):
        if not isinstance(config, dict) or key not in config:
            raise ConfigError(f"model configuration {path} lacks {key}; see open_clip's model_configs")
        if not isinstance(config[key], kind):
            raise ConfigError(
                f"model configuration {path}: {key} is {config[key]!r}, it must be of type {kind.__name__}; correct it"
            )
    _refuse_hub_models(config, str(path))
    return path.stem, config, data.get("preprocess_cfg", {})


def check_activation(model_config: str | Path, declared: str | None, place: str) -> None:
    """Raise ConfigError when a checkpoint declares another activation than the model computes with.

    Nothing else would tell: the weights of a QuickGELU model fit a GELU model and give other features. `declared` is
    None where the checkpoint does not say.
    """
    name, config, _ = read_model_config(model_config)
    computed = "quick_gelu" if config.get("quick_gelu") else "gelu"
    if declared is not None and declared != computed:
        other = f"{name}-quickgelu" if declared == "quick_gelu" else name.removesuffix("-quickgelu")
        raise ConfigError(
            f"{place} was trained with the activation {declared!r}, model {name!r} computes with {computed!r}: its "
            f"features would differ without an error; use the model {other}, or set quick_gelu in the JSON file"
        )


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hex digest of names, dtypes, shapes and values, whatever file format they came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _builtin(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    import open_clip

    if name not in open_clip.list_models():
        raise ConfigError(
            f"model {name!r} is neither a .json file nor one of open_clip's {len(open_clip.list_models())} models; "
            + _nearest_model(name, open_clip.list_models())
        )
    config: dict[str, Any] = open_clip.get_model_config(name)
    _refuse_hub_models(config, name)
    return name, config, {}


def _refuse_hub_models(config: Mapping[str, Any], place: str) -> None:
    """These towers and tokenizers are fetched from a hub when they are built; a run must not depend on that."""
    text = config["text_cfg"]
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if text.get(key):
            raise ConfigError(
                f"{place}: text_cfg.{key} = {text[key]!r} is fetched from a hub; choose a CLIP text tower"
            )
    if config["vision_cfg"].get("timm_model_name"):
        raise ConfigError(f"{place}: vision_cfg.timm_model_name is not supported; choose one of open_clip's own ViTs")


def _nearest_model(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return "`python -c 'import open_clip; print(open_clip.list_models())'` lists them"


def check_fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str) -> None:
    """Raise DataError with the differences unless `state` fills the whole model, whose own header is `own`."""
    faults = [f"missing {key} {tuple(own[key].shape)}" for key in own if key not in state]
    faults += [f"unexpected {key} {tuple(state[key].shape)}" for key in state if key not in own]
    faults += [
        f"{key}: {tuple(state[key].shape)} in the checkpoint, {tuple(own[key].shape)} in the model"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if not faults:
        return
    shown = "\n  ".join(faults[:SHOWN]) + (f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else "")
    tower_alone = not any(not key.startswith("visual.") for key in state)
    advice = (
        "it holds an image tower alone: the base must be the whole model, its text tower makes the class heads"
        if tower_alone
        else "choose the model it was made with"
    )
    raise DataError(f"the checkpoint does not fit model {name!r} in {len(faults)} place(s); {advice}\n  {shown}")
