"""Language models: load one, run it up to a hook, run it with the hook's value replaced, continue a text."""

from mechint.models.bridge import BridgedModel
from mechint.models.generate import Edit, edit_rows, generate
from mechint.models.language_model import LanguageModel, load_model

__all__ = ["BridgedModel", "Edit", "LanguageModel", "edit_rows", "generate", "load_model"]
