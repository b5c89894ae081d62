"""Language models: load one, run it up to a hook, run it with the hook's value replaced."""

from mechint.models.language_model import LanguageModel, load_model

__all__ = ["LanguageModel", "load_model"]
