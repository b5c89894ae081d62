"""`evaluate_checkpoint`: from a run directory or a checkpoint file to all the numbers of docs/metrics.md."""

import contextlib
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mechint.config import EvalConfig, SAETrainConfig
from mechint.data.batches import split_indices
from mechint.data.store import Activations, open_activations
from mechint.data.text import iter_texts_from_path
from mechint.errors import MechintError
from mechint.eval.bootstrap import group_of_texts, reconstruction_intervals
from mechint.eval.from_texts import evaluate_texts
from mechint.eval.histograms import DENSE, activity_metrics, density_histogram, l0_histogram
from mechint.eval.reconstruction import measure_activity, measure_rows
from mechint.eval.texts import Text, texts_from_rows, texts_from_tokens
from mechint.models import LanguageModel, load_model
from mechint.provenance import check_output_path, detect_device, get_git_commit, read_json
from mechint.runs import Run
from mechint.sae import SAE, load_sae
from mechint.subject import Subject, check_width

# What must be the same for an SAE and the activations it is applied to, beside the width.
SETTING = ("hook_name", "processing", "prepend_bos")


@dataclass(frozen=True)
class Target:
    """What to evaluate: the weights, the settings that they were trained with, and on which activations."""

    checkpoint: Path
    config: SAETrainConfig
    activations: Path
    trained_on: Path | None = None  # the activations that the run or its config.json names, if that is known
    notes: tuple[str, ...] = ()


# Keys of `evaluate_texts` that the command reports of texts; those of rows are measured on the stored ones.
OF_TEXTS = ("ce_", "kl_", "n_texts_ce", "n_predicted")


def evaluate_checkpoint(config: EvalConfig, *, progress: bool = False) -> dict[str, Any]:
    """Evaluate what `config` names. Everything that can be wrong is checked before the first pass over the data.

    Returns:
        The original's keys (val_mse, val_l0, dead_features, ...) and the newer metrics; nested ones hold intervals,
        histograms, windows, and the values with and without special tokens (docs/metrics.md). `notes` says in words
        what was assumed or left out, such as a language model that cannot be reached.

    Raises:
        MechintError: nothing to evaluate, files that are missing, broken or do not belong together, an existing output.
    """
    if config.output is not None and config.output.exists() and not config.overwrite:
        raise MechintError(f"{config.output} exists: give another --output, or --overwrite to replace it")
    if config.output is not None:
        check_output_path(config.output)
    if config.max_eval_texts < 0 or config.batch_size < 1 or config.resamples < 0:
        raise MechintError("--max-eval-texts and --resamples must not be negative, and --batch-size must be at least 1")
    given_texts = None if config.eval_texts_path is None else iter_texts_from_path(config.eval_texts_path)
    device = detect_device(config.device)
    target = find_target(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sae = load_sae(target.checkpoint, config=config.config, device=device)
    activations = open_activations(target.activations)
    assumed = sae.metadata.get("legacy") and not _take_setting(sae, activations, target)
    check_same_setting(sae, activations, target.checkpoint)
    train_indices, val_indices = _split(activations, target.config, config.rows)
    notes = [*target.notes, *(str(warning.message) for warning in caught if assumed)]
    spliced, note = prepare_language(config, target, sae, activations, val_indices, given_texts, device)
    if note is not None:
        notes.append(note)
    if spliced is not None and config.asks_for_more_texts_than(len(spliced[1])):
        notes.append(f"{config.max_eval_texts} texts were asked for, but there are only {len(spliced[1])} to read")

    batch_size = target.config.eval_batch_size
    activity = measure_activity(
        sae, activations, train_indices, batch_size=batch_size, device=device, progress=progress
    )
    groups, n_groups = (None, 1) if activations.text_ids is None else group_of_texts(activations.text_ids)
    rows = measure_rows(
        sae,
        activations,
        val_indices,
        groups=groups,
        n_groups=n_groups,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    result = {
        **rows.metrics(),
        **activity_metrics(activity.fire_counts, activity.n_rows),
        "n_train": activity.n_rows,
        "n_dense_val": int((rows.fire_counts > DENSE * rows.n).sum()),
        "l0_histogram": l0_histogram(rows.l0_counts),
        "density_histogram": density_histogram(activity.fire_counts, activity.n_rows),
        "windows": windows(activity.n_rows, rows.n),
        "ci95": {},
    }
    if groups is None:
        notes.append(f"intervals left out: {activations.path} does not say which text a row is from")
    else:
        used = rows.table[:, 0] > 0
        result["ci95"] = reconstruction_intervals(
            rows.table[used], rows.deviation[used], n_resamples=config.resamples, seed=config.seed
        )
    if spliced is not None:
        model, texts, hook_name = spliced
        known = _known(sae, activations)
        bos, context_size = known.get("prepend_bos", True), known.get("context_size")
        subject = Subject(sae, model, hook_name, target.checkpoint, None, bos, _keeps_bos(known), context_size)
        of_texts = evaluate_texts(
            subject,
            texts,
            mean=activity.mean.float(),
            batch_size=config.batch_size,
            n_resamples=config.resamples,
            seed=config.seed,
            progress=progress,
        )
        result |= {key: value for key, value in of_texts.items() if key.startswith(OF_TEXTS)}
        result["ci95"] |= {key: value for key, value in of_texts["ci95"].items() if key.startswith(OF_TEXTS)}
        result |= {key: value for key, value in of_texts.items() if key.endswith("_special")}
        result["model_name"] = config.model or activations.info.get("model_name") or model.name
    return {
        **result,
        "training_seconds": 0.0,
        "total_seconds": 0.0,
        "num_features": sae.d_sae,
        "num_params": sae.num_params,
        "git_commit": get_git_commit(),
        "checkpoint_path": str(target.checkpoint),
        "activations_path": str(target.activations),
        "rows": config.rows if config.rows == "all" else f"{config.rows} by {target.config.split_by}",
        "notes": notes,
    }


def windows(n_train: int, n_val: int) -> dict[str, Any]:
    """On how many rows of which set each count of latents was made."""
    train, held_out = {"set": "training rows", "n_rows": n_train}, {"set": "held-out rows", "n_rows": n_val}
    counts = {
        "dead_features": train | {"rule": "active on none"},
        "alive_features": train | {"rule": "active on at least one"},
        "dense_features": train | {"rule": "active on more than 10 %"},
        "features_over_1_percent": train | {"rule": "active on more than 1 %"},
        "n_dead_val": held_out | {"rule": "active on none"},
        "n_dense_val": held_out | {"rule": "active on more than 10 %"},
    }
    return {**counts, "density_histogram": train, "l0_histogram": held_out}


def find_target(config: EvalConfig) -> Target:
    """Which files `--run-dir`, `--checkpoint`, `--config` and `--activations-path` mean together."""
    if config.run_dir is not None:
        return _run_target(Run(config.run_dir), config.activations_path)
    if config.checkpoint is None:
        raise MechintError("Provide --checkpoint or --run-dir")
    path = config.checkpoint
    if not path.exists():
        raise MechintError(f"checkpoint not found: {path}; `ls runs/*/checkpoint.pt` shows those of your runs")
    if config.config is not None:
        settings = SAETrainConfig.from_dict(read_json(config.config, "config file"), source=str(config.config))
        return _config_target(path, settings, config.activations_path)
    for folder in (path, path.parent):
        if (folder / "config.json").is_file() and (folder / "checkpoint.pt").is_file():
            found = _run_target(Run(folder), config.activations_path)
            return replace(found, checkpoint=found.checkpoint if folder == path else path)
    beside = path.parent / "config.json"
    if path.is_file() and beside.is_file():
        settings = SAETrainConfig.from_dict(read_json(beside, "config file"), source=str(beside))
        return _config_target(path, settings, config.activations_path)
    # No record at all: the original's defaults, whose split is by row.
    settings = SAETrainConfig(split_by="row", batch_order="torch", preset="mech-int")
    note = (
        f"no config.json beside {path}: the original pipeline's default split (by row, seed 42, 5 % held out) is used"
    )
    return Target(path, settings, Path(config.activations_path or settings.activations_path), notes=(note,))


def _config_target(path: Path, settings: SAETrainConfig, activations_path: str | None) -> Target:
    trained_on = Path(settings.activations_path)
    return Target(path, settings, trained_on if activations_path is None else Path(activations_path), trained_on)


def _run_target(run: Run, activations_path: str | None) -> Target:
    if activations_path is not None:
        return Target(run.checkpoint_path, run.config, Path(activations_path))
    activations = run.activations_path()
    return Target(run.checkpoint_path, run.config, activations, activations)


def _take_setting(sae: SAE, activations: Activations, target: Target) -> bool:
    """Whether an SAE without a record of its own could take the record of the activations that it was trained on."""
    same = target.trained_on is not None and target.trained_on.resolve() == target.activations.resolve()
    if not same or "processing" not in activations.info or activations.info.get("legacy"):
        return False
    taken = {key: activations.info[key] for key in (*SETTING, "keep_bos") if key in activations.info}
    sae.metadata = {**sae.metadata, **taken, "legacy": False}
    return True


def check_same_setting(sae: SAE, activations: Activations, checkpoint: Path) -> None:
    """Raise `MechintError` if the SAE was trained on activations of another width, hook, processing or BOS rule."""
    if activations.d_in != sae.d_in:
        raise MechintError(
            f"{activations.path} holds vectors of width {activations.d_in}, but {checkpoint} has d_in {sae.d_in}: they"
            " do not belong together; give the right ones with --activations-path"
        )
    assumed = " (assumed, the checkpoint does not say)" if sae.metadata.get("legacy") else ""
    for key in SETTING:
        of_sae, of_rows = sae.metadata.get(key), activations.info.get(key)
        if of_sae is None or of_rows is None or of_sae == of_rows:
            continue
        remedy = "give the right ones with --activations-path"
        if assumed:
            remedy = "give its config.json with --config if it was trained on these, or collect with --preset mech-int"
        raise MechintError(
            f"{checkpoint} was trained on {key} {of_sae!r}{assumed if key != 'hook_name' else ''}, but"
            f" {activations.path} was collected with {key} {of_rows!r}: {remedy}"
        )


def _split(activations: Activations, settings: SAETrainConfig, rows: str) -> tuple[Tensor | None, Tensor | None]:
    if rows == "all":
        return None, None
    if settings.val_fraction == 0:
        raise MechintError(
            "the run held nothing out (val_fraction 0), so there is nothing to evaluate on: collect other texts, give"
            " them with --activations-path, and --rows all"
        )
    if settings.split_by == "text" and activations.text_ids is None:
        raise MechintError(
            f"{activations.path} does not say which text a row is from, so the run's split by text cannot be repeated:"
            " give the run's own activations, or --rows all"
        )
    train, val = split_indices(activations, settings.val_fraction, settings.seed, by=settings.split_by)
    if len(val) == 0:
        raise MechintError(
            f"a share of {settings.val_fraction:g} of {activations.n_rows} rows rounds to none: give --rows all"
        )
    return train, val


Spliced = tuple[LanguageModel, list[Text], str]


def prepare_language(
    config: EvalConfig,
    target: Target,
    sae: SAE,
    activations: Activations,
    val_indices: Tensor | None,
    given_texts: list[str] | None,
    device: str,
) -> tuple[Spliced | None, str | None]:
    """The model and the texts for the cross-entropy, checked to fit the SAE; or why there are none."""
    if config.max_eval_texts == 0:
        return None, "cross-entropy left out (--max-eval-texts 0)"
    known = _known(sae, activations)
    if given_texts is None and activations.tokens is None:
        return None, (
            f"cross-entropy left out: {activations.path} was stored without its tokens; give texts, one a line, with"
            " --eval-texts-path"
        )
    name = config.model or _model_name(known, target.config)
    processing = known.get("processing", "centred")
    hook_name = known.get("hook_name") or target.config.hook_name
    try:
        model = load_model(
            name, device=device, processing=processing, revision=None if config.model else known.get("model_revision")
        )
    except MechintError as error:
        if config.model is not None:
            raise
        return None, f"cross-entropy left out: {error} (with --model)"
    model = _with_hook(model, hook_name, config.backend)
    check_width(sae, model, hook_name)
    if given_texts is None:
        texts = texts_from_rows(activations, val_indices, max_texts=config.max_eval_texts)
    else:
        prepend_bos = known.get("prepend_bos", True)
        token_lists = model.tokenize(
            given_texts[: config.max_eval_texts], prepend_bos=prepend_bos, context_size=known.get("context_size")
        )
        texts = texts_from_tokens(token_lists, prepend_bos=prepend_bos, keep_bos=_keeps_bos(known))
    highest = max(max(text.tokens) for text in texts)
    if highest >= model.d_vocab:
        raise MechintError(
            f"{activations.path} holds token {highest}, but {name} has {model.d_vocab} tokens: another model made them"
        )
    return (model, texts, hook_name), _other_weights(known, model)


def _known(sae: SAE, activations: Activations) -> dict[str, Any]:
    """What is recorded of how the activations were made: by the SAE, else by the activations."""
    return {**activations.info, **{key: value for key, value in sae.metadata.items() if value is not None}}


def _model_name(known: dict[str, Any], settings: SAETrainConfig) -> str:
    """A local folder if it is still there (it was recorded in full), else the name that was typed at collection."""
    name, source = known.get("model_name"), known.get("model_source")
    if source and Path(source).is_dir() and not str(name).startswith("builtin/"):
        return source
    return name or source or settings.model_name


def _keeps_bos(known: dict[str, Any]) -> bool:
    """Whether the SAE was trained on BOS rows; the original pipeline always kept them."""
    return bool(known.get("keep_bos", known.get("legacy", False)))


def _with_hook(model: LanguageModel, hook_name: str, backend: str) -> LanguageModel:
    """The model with a backend that knows the hook. A hook that it does not have is an error that names near ones."""
    if backend in ("auto", model.backend):
        with contextlib.suppress(MechintError):
            model.check_hook(hook_name)
            return model
    return load_model(
        model.name, device=model.device, processing=model.processing, backend=backend, hook_name=hook_name
    )


def _other_weights(known: dict[str, Any], model: LanguageModel) -> str | None:
    recorded = known.get("model_sha256")
    if recorded is None or recorded == model.weights_sha256():
        return None
    return (
        f"the weights of {model.name} are not bit for bit those that the activations were collected with (another"
        " revision, or another --dtype)"
    )
