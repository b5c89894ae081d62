"""Names of a package that load on first use (PEP 562): importing the package does not import what they need."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, public: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package, from its public names and the modules that define them."""
    names = sorted(public)

    def load(name: str) -> Any:
        if name in public:
            return getattr(importlib.import_module(public[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {', '.join(names)}")

    def listed() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *names})

    return load, listed
