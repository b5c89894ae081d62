"""What every reader of an SAE begins with: the SAE, the model that it was trained on, the hook, and how texts become
tokens, opened together and checked to fit each other before any work."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from mechint.config import SAETrainConfig
from mechint.errors import MechintError
from mechint.models import LanguageModel, load_model
from mechint.provenance import read_json
from mechint.runs import Run
from mechint.sae import SAE, load_sae


@final
@dataclass(frozen=True)
class Subject:
    """An SAE in its place in a model. Make one with `open_subject`.

    Attributes:
        checkpoint: the file or folder that the weights are from.
        run: the run directory that the checkpoint lies in, if it does.
        prepend_bos, keep_bos: whether BOS stands before each text, and whether the SAE was trained on its row too.
        context_size: most tokens of a text, BOS included; None for the model's own limit.
        notes: in words, what was assumed.
    """

    sae: SAE
    model: LanguageModel
    hook_name: str
    checkpoint: Path
    run: Run | None
    prepend_bos: bool
    keep_bos: bool
    context_size: int | None
    notes: tuple[str, ...] = ()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as the SAE's activations were made: BOS and length as there.

        Raises:
            MechintError: no text, or one without any token.
        """
        if not texts:
            raise MechintError("no texts: give at least one")
        found = self.model.tokenize(texts, prepend_bos=self.prepend_bos, context_size=self.context_size)
        for text, tokens in zip(texts, found, strict=True):
            if not tokens:
                raise MechintError(f"the text {text[:40]!r} has no tokens: remove it or prepend BOS")
        return found

    def first_seen(self) -> int:
        """The first position whose activation the SAE was trained on: 1 where BOS rows were left out, else 0."""
        return 1 if self.prepend_bos and not self.keep_bos else 0


def open_subject(
    checkpoint: str | Path,
    *,
    config: Path | None = None,
    model: str | None = None,
    hook: str | None = None,
    processing: str | None = None,
    prepend_bos: bool | None = None,
    context_size: int | None = None,
    device: str | None = None,
    check: Callable[[SAE], object] | None = None,
) -> Subject:
    """Open a run directory, a checkpoint.pt, an old saved_models/*.pt or a folder in SAELens's layout with its model.

    What is not given is what the SAE was trained with; what is given must not contradict it. The SAE ends up on the
    model's device.

    Args:
        config: the config.json that belongs to the checkpoint, if it is neither in the checkpoint's folder nor needed.
        model: a model's name or folder in place of the one that the SAE names.
        check: called with the SAE before the model is loaded, which may take minutes; raises what is wrong.

    Raises:
        MechintError: files that are missing or broken, an unknown model or hook, an SAE that does not fit the model's
            width, the hook or the processing; the message names both sides.
    """
    path = Path(checkpoint)
    run = next((Run(folder) for folder in (path, path.parent) if (folder / "config.json").is_file()), None)
    if path.is_dir() and (path / "checkpoint.pt").is_file():
        path = path / "checkpoint.pt"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sae = load_sae(path, config=config)
    notes = [str(warning.message) for warning in caught]
    if check is not None:
        check(sae)
    hook_name = _hook_name(sae, path, config, hook)
    name = model or _model_name(sae)
    used = str(processing or sae.metadata.get("processing") or "raw")
    check_processing(sae, used, name)
    recorded_bos = bool(sae.metadata.get("prepend_bos", True))
    bos = recorded_bos if prepend_bos is None else prepend_bos
    if bos != recorded_bos:
        words = {True: "with BOS prepended", False: "without BOS"}
        notes.append(f"the SAE was trained on texts {words[recorded_bos]}, and is used here on texts {words[bos]}")
    loaded = load_model(
        name,
        device=device,
        processing=used,
        hook_name=hook_name,
        revision=None if model else sae.metadata.get("model_revision"),
    )
    check_width(sae, loaded, hook_name)
    recorded = sae.metadata.get("model_sha256")
    if recorded is not None and recorded != loaded.weights_sha256():
        notes.append(
            f"the weights of {loaded.name} are not bit for bit those that the SAE's activations were collected with"
            " (another revision, or another --dtype)"
        )
    keep_bos = bool(sae.metadata.get("keep_bos", sae.metadata.get("legacy", False)))
    context_size = context_size or sae.metadata.get("context_size")
    sae = sae.to(loaded.device)
    return Subject(sae, loaded, hook_name, path, run, bos, keep_bos, context_size, tuple(notes))


def check_processing(sae: SAE, processing: str | None, model_name: str) -> None:
    """Raise `MechintError` if the SAE's record names another processing. An assumed one (legacy) may be overruled."""
    recorded = sae.metadata.get("processing")
    if None in (recorded, processing) or recorded == processing or sae.metadata.get("legacy"):
        return
    raise MechintError(
        f"the SAE was trained on {recorded} activations, but {model_name} is used with processing {processing}: load"
        f" it with processing {recorded}"
    )


def check_width(sae: SAE, model: LanguageModel, hook_name: str) -> None:
    """Raise `MechintError` unless the hook's value is as wide as the SAE."""
    hooked = model.activations(torch.zeros(1, 2, dtype=torch.int64), hook_name)
    if hooked.ndim != 3 or hooked.shape[-1] != sae.d_in:
        raise MechintError(
            f"the SAE has d_in {sae.d_in}, but {hook_name} of {model.name} is {hooked.shape[-1]} wide: give the model"
            " that the SAE was trained on"
        )


def _hook_name(sae: SAE, path: Path, config: Path | None, hook: str | None) -> str:
    """The SAE's hook; a flag or a config.json may say it where the SAE does not, and must not contradict it."""
    said: dict[str, str] = {}
    if recorded := sae.metadata.get("hook_name"):
        said[str(path)] = recorded
    if config is not None:
        values = SAETrainConfig.from_dict(read_json(config, "config file"), source=str(config))
        said[str(config)] = values.hook_name
    if hook is not None:
        said["--hook"] = hook
    if len(set(said.values())) > 1:
        raise MechintError("; ".join(f"{source} says {name}" for source, name in said.items()) + ": which hook is it?")
    return next(iter(said.values()), SAETrainConfig().hook_name)


def _model_name(sae: SAE) -> str:
    """A local folder if it is still there (it was recorded in full), else the name that was typed at collection."""
    source = sae.metadata.get("model_source")
    if source and Path(source).is_dir():
        return source
    return sae.metadata.get("model_name") or source or SAETrainConfig().model_name
