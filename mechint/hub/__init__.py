"""Publishing to the Hugging Face Hub, and loading what was published there. Names load on first use."""

import importlib
from typing import Any

_PUBLIC = {
    "load_pretrained_sae": "mechint.hub.sae_loading",
    "load_steering_vector": "mechint.hub.steering_loading",
    "SAE_REGISTRY": "mechint.hub.registry",
    "STEERING_REGISTRY": "mechint.hub.registry",
    "SAEDescriptor": "mechint.hub.registry",
    "SteeringVectorDescriptor": "mechint.hub.registry",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mechint.hub' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
