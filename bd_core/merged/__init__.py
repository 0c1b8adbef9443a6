"""Per-sample merged models: theta(x_b) = theta_0 + sum_k w_bk tau_k, for any torch module."""

from bd_core.merged.model import MergedModel

__all__ = ["MergedModel"]
