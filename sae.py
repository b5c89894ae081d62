"""Old import path, kept: `from sae import SparseAutoEncoder, SAEloss`. New code imports from mechint."""

from mechint.sae import SAEloss, SparseAutoEncoder

__all__ = ["SAEloss", "SparseAutoEncoder"]
