"""SAEs in files: one file a format. Every module in this folder that defines `FORMAT` is registered."""

import importlib
import pkgutil

from mechint.formats.base import Format
from mechint.formats.folds import fold_scale, plain_form
from mechint.formats.oracle import reference_decode, reference_encode

# name -> format
FORMATS: dict[str, Format] = {}
for _module in pkgutil.iter_modules(__path__):
    _found = getattr(importlib.import_module(f"{__name__}.{_module.name}"), "FORMAT", None)
    if _found is not None:
        FORMATS[_found.name] = _found

__all__ = ["FORMATS", "Format", "fold_scale", "plain_form", "reference_decode", "reference_encode"]
