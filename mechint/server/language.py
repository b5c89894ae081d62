"""The model of an SAE, if it lies on this machine: it spells tokens and gives effects on the output."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mechint.errors import MechintError, one_line
from mechint.huggingface.files import cached_file
from mechint.server.models import SharedSAE

MAX_MODEL_BYTES = 2 << 30  # of weights: a larger model is not opened for the sake of a page


class Language(NamedTuple):
    """What is needed of a model: `model` is None where only its tokens can be spelled."""

    model: Any
    tokenizer: Any


def open_language(metadata: Mapping[str, Any], row: SharedSAE, run: Path | None, notes: list[str]) -> Language:
    """The model of the SAE with this metadata, if it lies on this machine: a request never downloads one."""
    from mechint.models import load_model

    # a downloaded file may name any folder; those that a run of this server recorded are its own
    trusted = [metadata.get("model_source"), metadata.get("model_name")] if run is not None else []
    names = [*trusted, metadata.get("model_name"), row.model_name]
    names = list(dict.fromkeys(str(name) for name in names if name))
    for name in names:
        folder = local_model(name, folders=name in trusted)
        if folder is None:
            continue
        try:
            if not Path(folder).is_dir() or _weight_bytes(Path(folder)) <= MAX_MODEL_BYTES:
                model = load_model(folder, device="cpu")
                return Language(model, model.tokenizer)
            notes.append(f"Output tokens are not shown: {name} is too large to be opened for that.")
            return Language(None, _tokenizer(folder))
        except MechintError as error:
            notes.append(f"{name} cannot be loaded: {without(error, Path(folder))}")
    named = names[-1] if names else "its model"
    notes.append(f"Tokens are shown as numbers, output tokens not at all: {named} is not on this machine.")
    return Language(None, None)


def local_model(name: str, *, folders: bool = False) -> str | None:
    """A built-in model's name, or the folder in the Hub's cache of one that is there; None for others.

    `folders`: whether `name` may itself be a folder.
    """
    from mechint.models.resolve import ALIASES, BUILTIN_MODELS

    if name in BUILTIN_MODELS:
        return name
    if folders and Path(name).is_dir():
        return name if (Path(name) / "config.json").is_file() else None
    found = cached_file(ALIASES.get(name, name), "config.json")
    return None if found is None else str(found.parent)


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what a broken file makes the readers raise has no common class
        raise MechintError(f"its tokenizer cannot be read ({type(error).__name__})") from None


def decode_of(tokenizer: Any) -> Callable[[list[int]], str]:
    if tokenizer is None:
        return lambda ids: " ".join(f"#{i}" for i in ids)
    from mechint.models.pieces import decoder

    return decoder(tokenizer)


def without(error: Exception, *folders: Path) -> str:
    """An error's text without where things lie on this machine."""
    text = one_line(error)
    for folder in folders:
        text = text.replace(str(folder), folder.name)
    return text
