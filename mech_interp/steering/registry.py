"""`load_steering_vector` and the registry of steering vectors, as `mechint.hub` defines them."""

from mechint.huggingface.registry import STEERING_REGISTRY, SteeringVectorDescriptor
from mechint.hub.steering_loading import load_steering_vector

__all__ = ["STEERING_REGISTRY", "SteeringVectorDescriptor", "load_steering_vector"]
