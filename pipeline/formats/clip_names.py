"""The names under which CLIP weights are saved elsewhere, mapped to open_clip's own.

The maps work on meta tensors too, so that a header alone can be mapped and compared without reading a single weight.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import DataError

VISUAL = "visual."
_WRAPPERS = (
    "module.",
    "_orig_mod.",
    "model.",
    "clip_model.",
)  # DataParallel, torch.compile, task_vectors' ImageEncoder
_VISUAL_ONLY = {"class_embedding", "conv1.weight", "ln_post.weight"}

_HF_BLOCK = re.compile(r"^(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)$")
_HF_IN_BLOCK = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"} | {
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_HF_OUTSIDE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # spelt so in the original
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "logit_scale": "logit_scale",
}
_HF_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


@dataclass(frozen=True)
class Part:
    """How one tensor of ours is made of a file's own: rows of all `sources` joined, transposed when it says so."""

    sources: tuple[str, ...]
    transposed: bool = False

    def assemble(self, values: Sequence[Tensor]) -> Tensor:
        """Our tensor, of the file's own in order of `sources`."""
        joined = torch.cat(list(values)) if len(values) > 1 else values[0]
        return joined.T.contiguous() if self.transposed else joined

    def take_apart(self, value: Tensor, headers: Sequence[Tensor]) -> list[Tensor]:
        """The file's own tensors, of ours: what `assemble` undoes."""
        whole = value.T if self.transposed else value
        rows = [len(header) for header in headers] if len(headers) > 1 else []
        return [part.contiguous() for part in (torch.split(whole, rows) if rows else [whole])]


def to_open_clip(state: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """`state` under open_clip's names: a full model's, or those of its image tower, each with the prefix `visual.`.

    Knows open_clip's full and image-tower-only state dicts, with or without a wrapper's prefix, and Hugging Face's
    CLIPModel and CLIPVisionModel. `place` names the file in errors. Raises DataError for names that are none of these.
    """
    parts = open_clip_parts(list(state), place)
    if parts is None:
        shown = ", ".join(sorted(state)[:5]) or "none"
        raise DataError(
            f"{place}: its {len(state)} tensor names ({shown}, ...) are neither open_clip's nor Hugging Face CLIP's; "
            "save the state dict of an open_clip model or of its image tower"
        )
    return {name: part.assemble([state[source] for source in part.sources]) for name, part in parts.items()}


def open_clip_parts(names: Sequence[str], place: str) -> dict[str, Part] | None:
    """open_clip's name -> how it is made of the file's own `names`, in their order; None for names of no CLIP model."""
    bare = unwrapped(names, _WRAPPERS)
    if "embeddings.patch_embedding.weight" in bare:  # CLIPVisionModel as of transformers 5
        bare = {f"vision_model.{name}": source for name, source in bare.items()}
    if any(name.startswith("vision_model.") for name in bare):
        return _from_hugging_face(bare, place)
    if any(name.startswith(VISUAL) for name in bare):
        return {name: Part((source,)) for name, source in bare.items()}
    if bare.keys() >= _VISUAL_ONLY:
        return {VISUAL + name: Part((source,)) for name, source in bare.items()}
    return None


def visual_only(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower's part of a state under open_clip's names, without the prefix `visual.`."""
    return {name.removeprefix(VISUAL): value for name, value in state.items() if name.startswith(VISUAL)}


def unwrapped(names: Sequence[str], wrappers: Sequence[str]) -> dict[str, str]:
    """Names without the prefixes that all of them share because a wrapper put them there -> the file's own."""
    bare = {name: name for name in names}
    while bare:
        prefix = next((wrapper for wrapper in wrappers if all(name.startswith(wrapper) for name in bare)), None)
        if prefix is None:
            break
        bare = {name.removeprefix(prefix): source for name, source in bare.items()}
    return bare


def _from_hugging_face(bare: Mapping[str, str], place: str) -> dict[str, Part]:
    mapped: dict[str, Part] = {}
    attention: dict[str, dict[str, str]] = {}
    unknown = []
    for name, source in bare.items():
        block = _HF_BLOCK.match(name)
        if block:
            tower, index, rest = block.groups()
            prefix = f"{VISUAL if tower == 'vision' else ''}transformer.resblocks.{index}."
            projection = re.match(r"^self_attn\.([qkv])_proj\.(weight|bias)$", rest)
            layer, _, kind = rest.rpartition(".")
            if projection:
                joined = f"{prefix}attn.in_proj_{projection[2]}"
                attention.setdefault(joined, {})[projection[1]] = source
                mapped.setdefault(joined, Part(()))  # in its place in the file; filled below
            elif layer in _HF_IN_BLOCK:
                mapped[f"{prefix}{_HF_IN_BLOCK[layer]}.{kind}"] = Part((source,))
            else:
                unknown.append(name)
        elif name in _HF_OUTSIDE:
            mapped[_HF_OUTSIDE[name]] = Part((source,))
        elif name in _HF_TRANSPOSED:
            mapped[_HF_TRANSPOSED[name]] = Part((source,), transposed=True)
        elif not name.endswith("position_ids"):  # a buffer 0..n-1 that older versions saved
            unknown.append(name)
    torn = [name for name, parts in attention.items() if parts.keys() != {"q", "k", "v"}]
    if unknown or torn:
        raise DataError(
            f"{place}: not a Hugging Face CLIP: unknown tensors {unknown[:5]}, incomplete attention {torn[:5]}; "
            "only CLIPModel and CLIPVisionModel are read"
        )
    return mapped | {name: Part(tuple(parts[part] for part in "qkv")) for name, parts in attention.items()}
