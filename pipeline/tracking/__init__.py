"""The only door to MLflow: a finished run, written after the fact from what the store holds."""

from pipeline.tracking.track import track_run, warm_up

__all__ = ["track_run", "warm_up"]
