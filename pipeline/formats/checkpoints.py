"""Checkpoints of the pipeline's models: any form that is read comes in under open_clip's names, whole."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline import logs
from pipeline.errors import DataError
from pipeline.formats.clip_names import VISUAL, to_open_clip, visual_only
from pipeline.formats.lazy import LazyState, open_file, weight_files

PROJECTION = "visual.proj"


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint under open_clip's names, on the CPU, in the dtypes they were saved in.

    `path` is a .safetensors file, a file that `torch.save` wrote of a state dict, or a Hugging Face CLIP folder. An
    image tower alone comes out with the prefix `visual.`. Raises ConfigError for a missing file, DataError otherwise.
    """
    # Copies: a tensor read lazily is a view of the file, which may be written to later.
    return {name: value.clone() for name, value in to_open_clip(_own(path), str(path)).items()}


def read_header(path: Path) -> dict[str, Tensor]:
    """Like `read_checkpoint`, as meta tensors: names, shapes and dtypes, while the weights stay on disk."""
    return to_open_clip(_own(path).header, str(path))


def _own(path: Path) -> LazyState:
    """The tensors of a checkpoint's files under the files' own names."""
    return LazyState({name: source for file in weight_files(path) for name, source in open_file(file).sources.items()})


def read_expert(path: Path, base: Mapping[str, Tensor], *, header_only: bool = False) -> dict[str, Tensor]:
    """The image tower of an expert, names without `visual.`; `base` is the whole base model, or its header.

    Text towers are left behind, with a warning where they differ from the base's: experts are merged in the image tower
    only. Hugging Face's CLIPVisionModel ends before the projection, so an expert saved from it never changed it, and
    the base's is taken.
    """
    expert = read_header(path) if header_only else read_checkpoint(path)
    if PROJECTION not in expert and PROJECTION in base:
        expert[PROJECTION] = base[PROJECTION]
    tower = visual_only(expert)
    if not header_only:
        _warn_of_text(path, base, expert)
    return tower


def _warn_of_text(path: Path, base: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> None:
    """Say that an expert was fine-tuned in more than its image tower."""
    beside = [name for name in expert if name in base and not name.startswith(VISUAL)]
    tuned = [name for name in beside if not torch.equal(expert[name], base[name].to(expert[name].dtype))]
    if tuned:
        logs.fact(
            "the text tower of this expert differs from the base's and is not merged; its class heads are the base's",
            level=logging.WARNING,
            checkpoint=path,
            tensors=len(tuned),
            first=tuned[0],
        )


def declared_activation(path: Path) -> str | None:
    """The activation a Hugging Face folder declares ("quick_gelu", "gelu"); None for files, which do not say."""
    if not (path / "config.json").is_file():
        return None
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        # The default of transformers' CLIP configurations, which leave it out when it is not changed.
        return str(config.get("vision_config", config).get("hidden_act", "quick_gelu"))
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path / 'config.json'}: not a model configuration ({error}); fetch it again") from None


def check_finite(state: Mapping[str, Tensor], place: str) -> None:
    """Raise DataError with the tensors' names when one holds NaN or infinity: no merged model could be right."""
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise DataError(
            f"{place}: {', '.join(broken[:5])}{more} hold NaN or infinity; take an earlier checkpoint of this model"
        )


def write_safetensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write `state`; equal names and values give equal bytes, in whatever order they come."""
    # No metadata: its order in the file is not fixed. Clones: the format refuses tensors that share memory.
    save_file({name: state[name].detach().cpu().contiguous().clone() for name in sorted(state)}, path)
