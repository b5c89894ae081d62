"""Sparse autoencoders: the module, its loss, and reading and writing its weights."""

from mechint.sae.io import load_sae, load_sae_checkpoint, save_checkpoint, save_sae_folder
from mechint.sae.standard import SAEloss, SparseAutoEncoder

__all__ = [
    "SAEloss",
    "SparseAutoEncoder",
    "load_sae",
    "load_sae_checkpoint",
    "save_checkpoint",
    "save_sae_folder",
]
