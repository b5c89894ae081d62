"""`load_steering_vector` and the registry of steering vectors, as `mechint.hub` defines them."""

from mechint.hub.steering_loading import load_steering_vector
from mechint.huggingface.registry import STEERING_REGISTRY, SteeringVectorDescriptor

__all__ = ["STEERING_REGISTRY", "SteeringVectorDescriptor", "load_steering_vector"]
