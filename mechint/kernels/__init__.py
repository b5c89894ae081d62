"""Training steps behind one contract; the dense float32 step is the reference that every other must equal."""

from mechint.kernels.choose import entry_finder, make_kernel
from mechint.kernels.contract import Kernel, Pass, StepResult, StepSettings
from mechint.kernels.dense import DenseKernel
from mechint.kernels.threads import pool

__all__ = ["DenseKernel", "Kernel", "Pass", "StepResult", "StepSettings", "entry_finder", "make_kernel", "pool"]
