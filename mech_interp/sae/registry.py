"""`load_pretrained_sae` and the registry of SAEs, as `mechint.hub` defines them."""

from mechint.huggingface.registry import SAE_REGISTRY, SAEDescriptor
from mechint.sae.load import load_pretrained_sae

__all__ = ["SAE_REGISTRY", "SAEDescriptor", "load_pretrained_sae"]
