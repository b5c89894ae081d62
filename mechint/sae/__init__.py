"""Sparse autoencoders: the architectures, their losses, and reading and writing their weights."""

import mechint.sae.architectures  # noqa: F401  (registers every architecture)
from mechint.sae.architectures.standard import StandardSAE
from mechint.sae.base import ARCHITECTURES, SAE, Loss, Objective, build_sae
from mechint.sae.io import load_sae, load_sae_checkpoint, save_checkpoint, save_sae_folder
from mechint.sae.legacy import SAEloss, SparseAutoEncoder

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "Loss",
    "Objective",
    "SAEloss",
    "SparseAutoEncoder",
    "StandardSAE",
    "build_sae",
    "load_sae",
    "load_sae_checkpoint",
    "save_checkpoint",
    "save_sae_folder",
]
