"""Importing this lets torchvision be imported beside a CPU build of torch; import it before open_clip and torchvision.

A torchvision built for CUDA registers fake kernels for `nms` at import, but its compiled operators do not load beside a
CPU torch, so the import dies with "operator torchvision::nms does not exist". Declaring the two schemas first is enough
for `transforms` and `models`; `torchvision.ops` and its image decoders stay unusable, and nothing here uses them.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _declare_missing_operators() -> torch.library.Library | None:
    """The library that holds the two schemas; None where torchvision brings its own operators."""
    spec = find_spec("torchvision")  # does not import it
    if spec is None or spec.origin is None or torch.version.cuda is not None or torch.version.hip is not None:
        return None
    version = Path(spec.origin).with_name("version.py")
    if not version.is_file() or "+cu" not in version.read_text(encoding="utf-8"):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(operator + _SCHEMA)  # type: ignore[no-untyped-call]
    return library


_LIBRARY = _declare_missing_operators()  # torch drops the schemas when the library is collected
