"""Training steps for a GPU, captured whole, that can skip the zeros: a sealed box. What it gives is here."""

from mechint.kernels.gpu.kernel import ManualKernel, misfit

__all__ = ["ManualKernel", "misfit"]
