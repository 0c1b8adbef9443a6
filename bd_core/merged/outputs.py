"""Nested outputs of a model: tensors in tuples, lists and dictionaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["concatenated", "first", "reordered"]


def first(output: Any) -> Any:
    """The single sample of every tensor in a nested output."""
    return _mapped(lambda x: x[0] if x.ndim else x, output)


def reordered(output: Any, order: Tensor) -> Any:
    """Every tensor's samples in this order."""
    return _mapped(lambda x: x[order] if x.ndim else x, output)


def concatenated(outputs: list[Any]) -> Any:
    """Nested outputs of consecutive parts of a batch as that of the whole."""
    head = outputs[0]
    if isinstance(head, Tensor):
        return torch.cat(outputs)
    if isinstance(head, dict):
        return {key: concatenated([output[key] for output in outputs]) for key in head}
    if isinstance(head, (tuple, list)):
        return type(head)(concatenated(list(parts)) for parts in zip(*outputs, strict=True))
    return head


def _mapped(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, dict):
        return {key: _mapped(function, value) for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        return type(output)(_mapped(function, value) for value in output)
    return output
