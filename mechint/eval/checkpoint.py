"""`evaluate_checkpoint`: from a run directory or any other SAE to all the numbers of docs/metrics.md."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mechint.config import EvalConfig, SAETrainConfig
from mechint.data.batches import split_as
from mechint.data.documents import Document
from mechint.data.norms import OUTLIER_MULTIPLE
from mechint.data.store import Activations, open_activations
from mechint.data.text import documents_from
from mechint.errors import MechintError
from mechint.eval.bootstrap import group_of_texts, reconstruction_intervals
from mechint.eval.from_texts import evaluate_texts
from mechint.eval.given import given_texts
from mechint.eval.histograms import DENSE, activity_metrics, density_histogram, l0_histogram
from mechint.eval.reconstruction import measure_activity, measure_rows, without_outliers
from mechint.eval.texts import Text, texts_from_rows
from mechint.inside import (
    SETTING,
    Inside,
    NotPlaced,
    check_same_setting,
    given_by,
    named_sae,
    open_sae,
    place_of,
    put_inside,
    run_of,
)
from mechint.provenance import check_output_path, detect_device, get_git_commit, read_json
from mechint.runs import Run
from mechint.sae import SAE


@dataclass(frozen=True)
class Target:
    """What to evaluate: the weights, the settings that they were trained with, and on which activations."""

    checkpoint: Path
    config: SAETrainConfig
    activations: Path | None  # None: on texts alone
    trained_on: Path | None = None  # the activations that the run or its config.json names, if that is known
    rows: str = "heldout"
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
    config = named_sae(config)
    if config.output is not None and config.output.exists() and not config.overwrite:
        raise MechintError(f"{config.output} exists: give another --output, or --overwrite to replace it")
    if config.output is not None:
        check_output_path(config.output)
    if config.max_eval_texts < 0 or config.batch_size < 1 or config.resamples < 0:
        raise MechintError("--max-eval-texts and --resamples must not be negative, and --batch-size must be at least 1")
    given = None
    if config.eval_texts_path is not None:
        how_many = max(config.max_eval_texts, 1)
        given = documents_from(config.eval_texts_path, config.text_field, config.unit, limit=how_many)
    device = detect_device(config.device)
    target = find_target(config)
    sae = open_sae(target.checkpoint, config=config.config).to(device)
    activations = None if target.activations is None else open_activations(target.activations)
    taken, val_indices, train_indices = False, None, None
    if activations is not None:
        taken = bool(sae.metadata.get("legacy")) and _take_setting(sae, activations, target)
        check_same_setting(sae, activations, target.checkpoint)
        train_indices, val_indices = _split(activations, target.config, target.rows)
    notes = [*target.notes, *(() if taken else sae.notes)]
    spliced, said = prepare_language(config, target.checkpoint, sae, activations, val_indices, given)
    notes += said
    if spliced is not None and config.asks_for_more_texts_than(len(spliced[1])):
        notes.append(f"{config.max_eval_texts} texts were asked for, but there are only {len(spliced[1])} to read")
    how: dict[str, Any] = {"n_resamples": config.resamples, "seed": config.seed}
    of_texts = {**how, "batch_size": config.batch_size, "progress": progress}
    if activations is None or sae.is_transcoder:
        if spliced is None:
            raise MechintError(
                f"there is nothing to measure {target.checkpoint} on: give --activations-path (a transcoder needs its"
                f" model and texts); {said[-1]}"
            )
        inside, texts = spliced
        result = evaluate_texts(inside, texts, **of_texts)
        notes.append(
            "every number is of the texts: ce_mean is left out, and latents count as dead by these texts alone"
        )
    else:
        result = _of_rows(sae, activations, target, train_indices, val_indices, notes, progress=progress, **how)
        mean = result.pop("mean")
        if spliced is not None:
            inside, texts = spliced
            typical = result.get("without_outliers")
            limit = None if typical is None else typical["norm_limit"]
            found = evaluate_texts(inside, texts, mean=mean, norm_limit=limit, **of_texts)
            if typical is not None:
                result["without_outliers"] = typical | found.pop("ce_without_outliers")
            result |= {key: value for key, value in found.items() if key.startswith(OF_TEXTS)}
            result["ci95"] |= {key: value for key, value in found["ci95"].items() if key.startswith(OF_TEXTS)}
            result |= {key: value for key, value in found.items() if key.endswith("_special")}
    if spliced is not None:
        recorded = None if activations is None else activations.info.get("model_name")
        result["model_name"] = config.model or recorded or spliced[0].model.name
    return {
        **result,
        "training_seconds": 0.0,
        "total_seconds": 0.0,
        "num_features": sae.d_sae,
        "num_params": sae.num_params,
        "git_commit": get_git_commit(),
        "checkpoint_path": str(target.checkpoint),
        "activations_path": None if activations is None else str(target.activations),
        "rows": target.rows if target.rows == "all" else f"{target.rows} by {target.config.split_by}",
        "notes": notes,
    }


def _of_rows(
    sae: SAE,
    activations: Activations,
    target: Target,
    train_indices: Tensor | None,
    val_indices: Tensor | None,
    notes: list[str],
    *,
    n_resamples: int,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """What is measured on stored rows, and under `mean` the mean of the training rows."""
    how: dict[str, Any] = {"batch_size": target.config.eval_batch_size, "progress": progress}
    activity = measure_activity(sae, activations, train_indices, **how)
    groups, n_groups = (None, 1) if activations.text_ids is None else group_of_texts(activations.text_ids)
    rows = measure_rows(sae, activations, val_indices, groups=groups, n_groups=n_groups, **how)
    result = {
        **rows.metrics(),
        **activity_metrics(activity.fire_counts, activity.n_rows),
        "n_train": activity.n_rows,
        "n_dense_val": int((rows.fire_counts > DENSE * rows.n).sum()),
        "l0_histogram": l0_histogram(rows.l0_counts),
        "density_histogram": density_histogram(activity.fire_counts, activity.n_rows),
        "windows": windows(activity.n_rows, rows.n),
        "ci95": {},
        "mean": activity.mean.float(),
    }
    typical = without_outliers(
        sae,
        activations,
        val_indices,
        multiple=target.config.max_norm_multiple or OUTLIER_MULTIPLE,
        batch_size=target.config.eval_batch_size,
    )
    if typical is not None:
        result["without_outliers"] = typical
        notes.append(
            f"{typical['n_outliers']:,} of {rows.n:,} rows have a norm above {typical['norm_limit']:.4g}, many times"
            f" the median: fvu is {result['fvu']:.4g} with them and {typical['fvu']:.4g} without (without_outliers)"
        )
    if groups is None:
        notes.append(f"intervals left out: {activations.path} does not say which text a row is from")
    else:
        used = rows.table[:, 0] > 0
        result["ci95"] = reconstruction_intervals(
            rows.table[used], rows.deviation[used], n_resamples=n_resamples, seed=seed
        )
    return result


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
    """Which files `--run-dir`, `--checkpoint`, `--config` and `--activations-path` mean together (`named_sae`)."""
    if config.run_dir is not None:
        return _run_target(Run(config.run_dir), config)
    path = place_of(config)
    if config.config is not None:
        settings = SAETrainConfig.from_dict(read_json(config.config, "config file"), source=str(config.config))
        return _config_target(path, settings, config)
    if (run := run_of(path)) is not None:
        found = _run_target(run, config)
        return replace(found, checkpoint=found.checkpoint if run.path == path else path)
    if config.sae is not None and path.suffix != ".pt":
        # neither one of our runs nor a file of the original pipeline: nothing says what was held out, if anything was
        rows = Path(config.activations_path) if config.activations_path is not None else None
        notes = () if rows is None else (f"nothing says which rows {path} was not trained on: all of {rows} are used",)
        return Target(path, SAETrainConfig(), rows, rows="all", notes=notes)
    beside = path.parent / "config.json"
    if path.is_file() and beside.is_file():
        settings = SAETrainConfig.from_dict(read_json(beside, "config file"), source=str(beside))
        return _config_target(path, settings, config)
    # No record at all: the original's defaults, whose split is by row.
    settings = SAETrainConfig(split_by="row", batch_order="torch", preset="mech-int")
    note = (
        f"no config.json beside {path}: the original pipeline's default split (by row, seed 42, 5 % held out) is used"
    )
    activations = Path(config.activations_path or settings.activations_path)
    return Target(path, settings, activations, rows=config.rows, notes=(note,))


def _config_target(path: Path, settings: SAETrainConfig, config: EvalConfig) -> Target:
    trained_on = Path(settings.activations_path)
    activations = trained_on if config.activations_path is None else Path(config.activations_path)
    return Target(path, settings, activations, trained_on, config.rows)


def _run_target(run: Run, config: EvalConfig) -> Target:
    if config.activations_path is not None:
        return Target(run.checkpoint_path, run.config, Path(config.activations_path), rows=config.rows)
    activations = run.activations_path()
    return Target(run.checkpoint_path, run.config, activations, activations, config.rows)


def _take_setting(sae: SAE, activations: Activations, target: Target) -> bool:
    """Whether an SAE without a record of its own could take the record of the activations that it was trained on."""
    same = target.trained_on is not None and target.trained_on.resolve() == activations.path.resolve()
    if not same or "processing" not in activations.info or activations.info.get("legacy"):
        return False
    taken = {key: activations.info[key] for key in (*SETTING, "keep_bos") if key in activations.info}
    sae.metadata = {**sae.metadata, **taken, "legacy": False}
    return True


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
    train, val = split_as(settings, activations)
    if len(val) == 0:
        raise MechintError(
            f"a share of {settings.val_fraction:g} of {activations.n_rows} rows rounds to none: give --rows all"
        )
    return train, val


Spliced = tuple[Inside, list[Text]]


def prepare_language(
    config: EvalConfig,
    checkpoint: Path,
    sae: SAE,
    activations: Activations | None,
    val_indices: Tensor | None,
    given: list[Document] | None,
) -> tuple[Spliced | None, list[str]]:
    """The SAE in its model and the texts for the cross-entropy; or why there are none. And what was assumed."""
    if config.max_eval_texts == 0:
        return None, ["cross-entropy left out (--max-eval-texts 0)"]
    if given is None and (activations is None or activations.tokens is None):
        where = "nothing" if activations is None else activations.path
        return None, [
            f"cross-entropy left out: {where} was stored without its tokens; give texts with --eval-texts-path"
        ]
    place = given_by(config)
    place["backend"] = config.backend
    try:
        inside = put_inside(sae, checkpoint, known=None if activations is None else activations.info, **place)
    except NotPlaced as error:
        if config.model is not None:
            raise
        return None, [f"cross-entropy left out: {error} (with --model)"]
    notes = list(inside.notes)
    if given is None:
        assert activations is not None
        texts = texts_from_rows(activations, val_indices, max_texts=config.max_eval_texts)
    else:
        texts, told = given_texts(inside, given)
        notes += told
    if activations is not None:
        inside.check_tokens(max(max(text.tokens) for text in texts), activations.path)
    return (inside, texts), notes
