"""The same stages on either executor: serial in this process, or Ray."""

from pipeline.executors.ray import RayExecutor
from pipeline.executors.ray_session import RaySpec
from pipeline.executors.serial import SerialExecutor, SerialSpec
from pipeline.executors.unit import Executor, Outcome, Planned

__all__ = ["Executor", "Outcome", "Planned", "RayExecutor", "RaySpec", "SerialExecutor", "SerialSpec"]
