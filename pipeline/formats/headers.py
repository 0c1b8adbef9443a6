"""Comparing checkpoints by their headers, before a single weight is read."""

from collections.abc import Mapping

from torch import Tensor

from pipeline.errors import DataError

SHOWN = 12  # differences spelled out in one message; the rest is counted


def compare_headers(base: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> list[str]:
    """One line a difference in names, shapes or dtypes, in order of the names; empty when they fit."""
    lines = []
    for name in sorted(base.keys() | expert.keys()):
        if name not in expert:
            lines.append(f"- {name} {_describe(base[name])}: only in the base")
        elif name not in base:
            lines.append(f"+ {name} {_describe(expert[name])}: only in the expert")
        elif _describe(base[name]) != _describe(expert[name]):
            lines.append(f"~ {name}: {_describe(base[name])} in the base, {_describe(expert[name])} in the expert")
    return lines


def check_experts(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise DataError with the printed difference unless every expert has the base's names, shapes and dtypes."""
    differences = {name: lines for name, expert in experts.items() if (lines := compare_headers(base, expert))}
    if not differences:
        return
    parts = []
    each = max(1, SHOWN // len(differences))
    for name, lines in differences.items():
        parts.append(f"  expert {name}: {len(lines)} difference(s)")
        parts += [f"    {line}" for line in lines[:each]]
        if len(lines) > each:
            parts.append(f"    and {len(lines) - each} more")
    raise DataError(
        f"{len(differences)} of {len(experts)} experts do not fit the base; merge only models that were fine-tuned "
        "from it, saved in its dtype\n" + "\n".join(parts)
    )


def _describe(value: Tensor) -> str:
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
