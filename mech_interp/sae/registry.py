"""`load_pretrained_sae` and the registry of SAEs, as `mechint.hub` defines them."""

from mechint.hub.registry import SAE_REGISTRY, SAEDescriptor
from mechint.hub.sae_loading import load_pretrained_sae

__all__ = ["SAE_REGISTRY", "SAEDescriptor", "load_pretrained_sae"]
