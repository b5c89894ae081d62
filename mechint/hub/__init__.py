"""Publishing to the Hugging Face Hub, and loading what was published there. Names load on first use."""

from mechint.lazy import lazy_names

_PUBLIC = {
    "load_pretrained_sae": "mechint.sae.load",
    "load_steering_vector": "mechint.hub.steering_loading",
    "SAE_REGISTRY": "mechint.huggingface.registry",
    "STEERING_REGISTRY": "mechint.huggingface.registry",
    "SAEDescriptor": "mechint.huggingface.registry",
    "SteeringVectorDescriptor": "mechint.huggingface.registry",
}
__all__ = sorted(_PUBLIC)
__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
