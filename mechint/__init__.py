"""Sparse autoencoders on language-model activations: collect, train, evaluate, ablate, compare.

Names are loaded on first use (PEP 562), so `import mechint` does not import torch.
"""

from mechint.lazy import lazy_names

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "MechintError": "mechint.errors",
    "SAETrainConfig": "mechint.config",
    "SparseAutoEncoder": "mechint.sae",
    "SAEloss": "mechint.sae",
    "SAE": "mechint.sae",
    "SAEConfig": "mechint.sae",
    # the SAELens-style API: docs/saelens.md
    "HookedSAETransformer": "mechint.saelens",
    "ActivationsStore": "mechint.saelens",
    "LanguageModelSAERunnerConfig": "mechint.saelens",
    "SAETrainingRunner": "mechint.saelens",
    "upload_saes_to_huggingface": "mechint.saelens",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
