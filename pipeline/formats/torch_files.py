"""torch's own files (.pt, .pth, .bin): where their tensors lie, without loading them and without running a pickle.

A pickle can run any code when it is loaded. Only torch's restricted reader is used, which knows tensors and containers
and no other class; a file that holds anything else is refused, whoever made it.
"""

import io
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pipeline.errors import DataError
from pipeline.formats.spans import Loaded, OpenFile, Source, Span, TensorFile

_NESTED = ("state_dict", "model_state_dict", "model")  # the keys training loops use
_PLAIN = ("torch._utils.", "torch.FloatStorage", "torch.HalfStorage", "torch.LongStorage", "collections.OrderedDict")
_PICKLES = 5  # torch's old format is a row of that many


def open_torch(path: Path) -> TensorFile:
    """The state dict in the file. Of zip files (torch 1.6 and newer) no value is read, older ones are read whole.

    Raises DataError for pickles of anything but tensors, TorchScript archives, files cut short and no state dict.
    """
    file = OpenFile(path)
    zipped = zipfile.is_zipfile(path)
    state = _state_dict(_load(path, lazily=zipped), path)
    sources: dict[str, Source] = {}
    for name, value in state.items():
        sources[name] = _span(file, name, value) if zipped else Loaded(value.detach())
    if zipped:  # in the order of the file, as disks like to be read
        sources = dict(sorted(sources.items(), key=lambda item: getattr(item[1], "offset", 0)))
    return TensorFile(file, sources, {})


def _load(path: Path, *, lazily: bool) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript archives, which are refused below
            if lazily:
                # Fake tensors know where their storage lies in the file and hold nothing.
                with FakeTensorMode(), path.open("rb") as opened:
                    return torch.load(opened, map_location="cpu", weights_only=True)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(_refusal(path, error)) from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{path}: not a state dict that torch can read ({reason}); TorchScript archives and files cut short are "
            "not read: save the state dict as .safetensors"
        ) from None


def _refusal(path: Path, error: Exception) -> str:
    """Why a pickle is refused, by the first name in it that is more than tensors, and what to do."""
    wanted = next((name for name in _globals(path) if not name.startswith(_PLAIN)), None)
    text = " ".join(str(error).split())
    reason = f"it wants {wanted}" if wanted else text[max(text.find("WeightsUnpickler error:"), 0) :][:160]
    return (
        f"{path}: refused, it is a pickle of more than tensors and loading it could run any code ({reason}). Nothing "
        "was executed. If you trust its source, load it yourself, where that class is installed, and save only the "
        "weights: safetensors.torch.save_file(torch.load(path, weights_only=False).state_dict(), 'expert.safetensors')"
    )


def _globals(path: Path) -> list[str]:
    """The names of classes and functions that a file's pickle would import, read off it without importing any."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith("data.pkl")]
            streams = [io.BytesIO(archive.read(name)) for name in members]
    else:
        streams = [io.BytesIO(path.read_bytes())]
    found: list[str] = []
    for stream in streams:
        strings: list[str] = []
        try:
            for _ in range(_PICKLES):
                for operation, argument, _position in pickletools.genops(stream):
                    if operation.name == "GLOBAL":
                        found.append(str(argument).replace(" ", "."))
                    elif operation.name == "STACK_GLOBAL":
                        found.append(".".join(strings[-2:]))
                    elif isinstance(argument, str):
                        strings.append(argument)
        except (ValueError, IndexError, UnicodeDecodeError):
            continue  # the pickle ended, or was none
    return found


def _state_dict(loaded: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what was loaded: itself, or below one of the keys training loops use."""
    for key in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if isinstance(loaded, Mapping) and loaded and all(isinstance(value, Tensor) for value in loaded.values()):
        return {str(name): value for name, value in loaded.items()}
    kind = f"a {type(loaded).__name__}"
    if isinstance(loaded, Mapping):
        kind = f"a mapping with keys {', '.join(str(key) for key in list(loaded)[:5]) or '(none)'}"
    raise DataError(f"{path}: holds {kind}, not a state dict of named tensors; save model.state_dict()")


def _span(file: OpenFile, name: str, value: Tensor) -> Span:
    if not isinstance(value, FakeTensor) or value.is_quantized or value.layout != torch.strided:
        raise DataError(f"{file.path}: {name} is no plain tensor ({value.layout}); save it dense and unquantised")
    storage = value.untyped_storage()
    offset = getattr(storage, "_checkpoint_offset", None)
    if offset is None:
        raise DataError(f"{file.path}: {name} has no place in the file that torch tells; save it as .safetensors")
    stride = None if value.is_contiguous() else tuple(value.stride())
    begin = int(offset) + int(value.storage_offset()) * value.element_size()
    span = Span(file, begin, value.dtype, tuple(value.shape), stride)
    if begin + span.size_bytes > file.size_bytes:
        raise DataError(f"{file.path}: {name} lies beyond the end of the file; it is cut short, copy it again")
    return span
