"""Sparse autoencoders: the class, the architectures and their losses, and opening and saving them."""

from typing import TYPE_CHECKING

import mechint.sae.architectures  # noqa: F401  (registers every architecture)
from mechint.lazy import lazy_names
from mechint.sae.architectures.standard import StandardSAE
from mechint.sae.base import ARCHITECTURES, SAE, build_sae, find_architecture
from mechint.sae.checkpoint import save_checkpoint
from mechint.sae.config import SAEConfig
from mechint.sae.legacy import SAEloss, SparseAutoEncoder
from mechint.sae.objective import Loss, Objective

if TYPE_CHECKING:
    from mechint.sae.load import load_sae, load_sae_checkpoint

# The door knows every format of files, which are built on the class: it is loaded when something is opened.
_DOOR = {name: "mechint.sae.load" for name in ("load_sae", "load_sae_checkpoint")}
__getattr__, _ = lazy_names(__name__, _DOOR)

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "Loss",
    "Objective",
    "SAEConfig",
    "SAEloss",
    "SparseAutoEncoder",
    "StandardSAE",
    "build_sae",
    "find_architecture",
    "load_sae",
    "load_sae_checkpoint",
    "save_checkpoint",
]
