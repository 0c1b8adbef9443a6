"""The same stages on either executor: serial in this process, or Ray."""

from pipeline.executors.serial import SerialExecutor
from pipeline.executors.unit import Executor, Outcome, Planned

__all__ = ["Executor", "Outcome", "Planned", "SerialExecutor"]
