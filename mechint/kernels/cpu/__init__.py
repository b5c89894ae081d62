"""Training steps on a CPU that skip the zeros: a sealed box. What it gives is here, its other files are its own.

Importing it needs numba: `mechint.kernels.choose` asks, and says why where it cannot be had.
"""

from mechint.kernels.cpu.encode import EntryFinder, entry_finder
from mechint.kernels.cpu.kernel import SparseKernel, broken, misfit
from mechint.kernels.cpu.memory import step_bytes

__all__ = ["EntryFinder", "SparseKernel", "broken", "entry_finder", "misfit", "step_bytes"]
