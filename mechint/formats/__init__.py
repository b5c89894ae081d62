"""SAEs of other tools: one file a format. Every module in this folder that defines `FORMAT` is registered."""

import importlib
import pkgutil

from mechint.formats.base import (
    FORMATS,
    Format,
    Loaded,
    reference_decode,
    reference_encode,
)
from mechint.formats.folds import canonical, from_sae, to_sae

for _module in pkgutil.iter_modules(__path__):
    _found = getattr(importlib.import_module(f"{__name__}.{_module.name}"), "FORMAT", None)
    if _found is not None:
        FORMATS[_found.name] = _found

__all__ = [
    "FORMATS",
    "Format",
    "Loaded",
    "canonical",
    "from_sae",
    "reference_decode",
    "reference_encode",
    "to_sae",
]
