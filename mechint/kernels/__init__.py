"""Training steps behind one contract; the dense float32 step is the reference that every other must equal."""

from mechint.kernels.dense import StepResult, dense_step

__all__ = ["StepResult", "dense_step"]
