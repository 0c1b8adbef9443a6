"""Checkpoints: safetensors, torch state dicts and Hugging Face CLIP folders in, open_clip names out. Nothing executed.

A pickle can run any code when it is loaded. Only torch's restricted reader is used, which knows tensors and containers
and no other class; a file that holds anything else is refused, whoever made it.
"""

import json
import logging
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline import logs
from pipeline.errors import ConfigError, DataError
from pipeline.formats.clip_names import VISUAL, to_open_clip, visual_only

PROJECTION = "visual.proj"
_HF_INDEX = "model.safetensors.index.json"
_HF_FILES = ("model.safetensors", "pytorch_model.bin")
_SAFE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint under open_clip's names, on the CPU, in the dtypes they were saved in.

    `path` is a .safetensors file, a file that `torch.save` wrote of a state dict, or a Hugging Face CLIP folder. An
    image tower alone comes out with the prefix `visual.`. Raises ConfigError for a missing file, DataError otherwise.
    """
    return to_open_clip(_read(path, header_only=False), str(path))


def read_header(path: Path) -> dict[str, Tensor]:
    """Like `read_checkpoint`, as meta tensors: names, shapes and dtypes, while the weights stay on disk."""
    return to_open_clip(_read(path, header_only=True), str(path))


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


def _read(path: Path, *, header_only: bool) -> dict[str, Tensor]:
    if path.is_dir():
        parts = [_read(file, header_only=header_only) for file in _weight_files(path)]
        return {name: value for part in parts for name, value in part.items()}
    if not path.is_file():
        raise ConfigError(f"checkpoint {path} does not exist; correct the path")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, header_only)
    return _state_dict_of(_load_torch(path, header_only), path)


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold a Hugging Face folder's weights, shards in order."""
    if (folder / _HF_INDEX).is_file():
        try:
            shards = sorted(set(json.loads((folder / _HF_INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{folder / _HF_INDEX}: not an index of shards ({error!r}); fetch it again") from None
        escaping = [shard for shard in shards if Path(shard).name != shard]
        if escaping:
            raise DataError(f"{folder / _HF_INDEX}: shard {escaping[0]!r} lies outside the folder; fetch it again")
        return [folder / shard for shard in shards]
    for name in _HF_FILES:
        if (folder / name).is_file():
            return [folder / name]
    raise ConfigError(f"checkpoint folder {folder} holds none of {_HF_INDEX}, {', '.join(_HF_FILES)}; name a file")


def _read_safetensors(path: Path, header_only: bool) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            if not header_only:
                return {name: file.get_tensor(name) for name in sorted(file.keys())}
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            return {
                name: torch.empty(part.get_shape(), dtype=_SAFE_DTYPES[part.get_dtype()], device="meta")
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise DataError(
            f"{path}: not a readable safetensors file ({error}); it may be cut short, copy it again"
        ) from None
    except KeyError as error:
        raise DataError(f"{path}: holds tensors of dtype {error}, which cannot be merged; convert them") from None


def _load_torch(path: Path, header_only: bool) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript archives, which are refused below
            if header_only:
                # Mapped, the values of a zip file are never read; older files are read and dropped.
                return torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: refused, it is a pickle of more than tensors and loading it could run any code "
            f"({_first_reason(error)}). Nothing was executed. If you trust its source, load it yourself and save "
            "only the weights: safetensors.torch.save_file(model.state_dict(), 'expert.safetensors')"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{path}: not a state dict that torch can read ({reason}); TorchScript archives and files cut short are "
            "not read: save the state dict as .safetensors"
        ) from None


def _first_reason(error: Exception) -> str:
    """The sentence of torch's long advice that says which global the file wanted."""
    text = " ".join(str(error).split())
    start = max(text.find("WeightsUnpickler error:"), 0)
    return text[start : start + 160].split(". ")[0]


def _state_dict_of(loaded: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what was loaded: itself, or below one of the keys training loops use."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if isinstance(loaded, Mapping) and loaded and all(isinstance(value, Tensor) for value in loaded.values()):
        return {str(name): value for name, value in loaded.items()}
    kind = f"a {type(loaded).__name__}"
    if isinstance(loaded, Mapping):
        kind = f"a mapping with keys {', '.join(str(key) for key in list(loaded)[:5]) or '(none)'}"
    raise DataError(f"{path}: holds {kind}, not a state dict of named tensors; save model.state_dict()")
