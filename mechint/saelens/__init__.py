"""Code that was written for SAELens, on mechint: its names, arguments and returns. See docs/saelens.md.

Names load on first use, so that importing the package imports neither torch nor transformer_lens.
"""

from mechint.lazy import lazy_names

_PUBLIC = {
    "SAE": "mechint.sae",
    "SAEConfig": "mechint.sae.config",
    "SAEMetadata": "mechint.sae.config",
    "HookedSAETransformer": "mechint.saelens.hooked",
    "ActivationsStore": "mechint.saelens.store",
    "LanguageModelSAERunnerConfig": "mechint.saelens.config",
    "LoggingConfig": "mechint.saelens.nested",
    "StandardTrainingSAEConfig": "mechint.saelens.nested",
    "GatedTrainingSAEConfig": "mechint.saelens.nested",
    "TopKTrainingSAEConfig": "mechint.saelens.nested",
    "JumpReLUTrainingSAEConfig": "mechint.saelens.nested",
    "BatchTopKTrainingSAEConfig": "mechint.saelens.nested",
    "MatryoshkaBatchTopKTrainingSAEConfig": "mechint.saelens.nested",
    "SAETrainingRunner": "mechint.saelens.runner",
    "LanguageModelSAETrainingRunner": "mechint.saelens.runner",
    "upload_saes_to_huggingface": "mechint.saelens.upload",
    "neuronpedia_id": "mechint.saelens.neuronpedia",
    "neuronpedia_url": "mechint.saelens.neuronpedia",
    "parse_neuronpedia": "mechint.saelens.neuronpedia",
    "neuronpedia_features": "mechint.saelens.neuronpedia",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
