"""`ablate`: from a checkpoint and a file of texts to the ranking, as the command line asks for it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechint.ablation.rank import feature_indices, rank_features_by_ablation, save_ablation_rows
from mechint.ablation.subject import check_fit, check_processing
from mechint.config import AblateConfig, SAETrainConfig
from mechint.data.text import iter_texts_from_path
from mechint.errors import MechintError
from mechint.models import LanguageModel, load_model
from mechint.provenance import check_output_path, read_json, sha256_json
from mechint.sae import SAE, load_sae


@dataclass(frozen=True)
class Ablation:
    """The rows that were written, where, and in words what was assumed."""

    rows: list[dict[str, Any]]
    output: Path
    notes: tuple[str, ...]


def partial_path(output: Path) -> Path:
    """Where the sums of finished texts are kept until `output` is written."""
    return output.with_name(output.name + ".partial")


def ablate(
    config: AblateConfig, *, progress: bool = True, on_note: Callable[[str], None] = lambda note: None
) -> Ablation:
    """Rank the latents of a checkpoint over a file of texts and write the CSV.

    Model, hook, processing and BOS are those that the SAE was trained with. Everything that can be wrong is checked
    before the model is loaded, as far as it can be, and the rest before the first ablation. `on_note` is given what was
    assumed, in words, before the work begins.

    Raises:
        MechintError: an existing output without `overwrite`, files that are missing or broken, an empty text file, a
            feature subset that names nothing, an SAE that does not fit the model, hook or processing.
    """
    if config.output.exists() and not config.overwrite:
        raise MechintError(f"{config.output} exists: give another --output, or --overwrite to replace it")
    check_output_path(config.output)
    if config.batch_size < 1:
        raise MechintError(f"--batch-size must be at least 1, got {config.batch_size}")
    if config.context_size is not None and config.context_size < 2:
        raise MechintError(f"--context-size must be at least 2, got {config.context_size}")
    texts = iter_texts_from_path(config.eval_texts_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sae = load_sae(config.checkpoint, config=config.config)
    notes = [str(warning.message) for warning in caught]
    features = feature_indices(config.feature_subset, sae.d_sae)
    hook_name = _hook_name(config, sae)
    name = config.model or _model_name(sae)
    processing = config.processing or sae.metadata.get("processing") or "raw"
    check_processing(sae, processing, name)
    prepend_bos = sae.metadata.get("prepend_bos", True) if config.prepend_bos is None else config.prepend_bos
    if prepend_bos != sae.metadata.get("prepend_bos", prepend_bos):
        notes.append(
            f"the SAE was trained on texts {_bos(not prepend_bos)}, and is used here on texts {_bos(prepend_bos)}"
        )
    model = load_model(
        name,
        device=config.device,
        processing=processing,
        hook_name=hook_name,
        revision=None if config.model else sae.metadata.get("model_revision"),
    )
    check_fit(sae, model, hook_name)  # before the notes: what cannot be done needs no assumptions
    notes += _other_weights(sae, model)
    for note in notes:
        on_note(note)
    rows = rank_features_by_ablation(
        sae,
        model,
        hook_name,
        texts,
        features,
        progress,
        prepend_bos=prepend_bos,
        context_size=config.context_size,
        batch_size=config.batch_size,
        partial_path=partial_path(config.output),
        fingerprint=_fingerprint(config, sae, model, hook_name, prepend_bos, texts, features),
    )
    save_ablation_rows(rows, config.output, overwrite=config.overwrite)
    partial_path(config.output).unlink(missing_ok=True)
    return Ablation(rows, config.output, tuple(notes))


def _hook_name(config: AblateConfig, sae: SAE) -> str:
    """The SAE's hook; a flag or a config.json may say it where the SAE does not, and must not contradict it."""
    said: dict[str, str] = {}
    if recorded := sae.metadata.get("hook_name"):
        said[str(config.checkpoint)] = recorded
    if config.config is not None:
        values = SAETrainConfig.from_dict(read_json(config.config, "config file"), source=str(config.config))
        said[str(config.config)] = values.hook_name
    if config.hook is not None:
        said["--hook"] = config.hook
    if len(set(said.values())) > 1:
        raise MechintError("; ".join(f"{source} says {hook}" for source, hook in said.items()) + ": which hook is it?")
    return next(iter(said.values()), SAETrainConfig().hook_name)


def _model_name(sae: SAE) -> str:
    """A local folder if it is still there (it was recorded in full), else the name that was typed at collection."""
    source = sae.metadata.get("model_source")
    if source and Path(source).is_dir():
        return source
    return sae.metadata.get("model_name") or source or SAETrainConfig().model_name


def _bos(prepended: bool) -> str:
    return "with BOS prepended" if prepended else "without BOS"


def _other_weights(sae: SAE, model: LanguageModel) -> list[str]:
    recorded = sae.metadata.get("model_sha256")
    if recorded is None or recorded == model.weights_sha256():
        return []
    return [
        f"the weights of {model.name} are not bit for bit those that the SAE's activations were collected with"
        " (another revision, or another --dtype)"
    ]


def _fingerprint(
    config: AblateConfig,
    sae: SAE,
    model: LanguageModel,
    hook_name: str,
    prepend_bos: bool,
    texts: list[str],
    features: list[int],
) -> str:
    """Changes with anything that changes the sums of a partial result."""
    import hashlib

    weights = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha256_json(
        {
            "sae": weights.hexdigest(),
            "model": model.weights_sha256(),
            "processing": model.processing,
            "hook_name": hook_name,
            "prepend_bos": prepend_bos,
            "context_size": config.context_size,
            "texts": texts,
            "features": features,
            "layout": 1,
        }
    )
