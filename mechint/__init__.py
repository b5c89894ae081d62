"""Sparse autoencoders on language-model activations: collect, train, evaluate, ablate, compare.

Names are loaded on first use (PEP 562), so `import mechint` does not import torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "MechintError": "mechint.errors",
    "SAETrainConfig": "mechint.config",
    "SparseAutoEncoder": "mechint.sae",
    "SAEloss": "mechint.sae",
    # the SAELens-style API: docs/saelens.md
    "SAE": "mechint.saelens",
    "SAEConfig": "mechint.saelens",
    "HookedSAETransformer": "mechint.saelens",
    "ActivationsStore": "mechint.saelens",
    "LanguageModelSAERunnerConfig": "mechint.saelens",
    "SAETrainingRunner": "mechint.saelens",
    "upload_saes_to_huggingface": "mechint.saelens",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mechint' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
