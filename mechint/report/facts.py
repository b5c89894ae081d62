"""What a run's own files say, for the first screen of its report: nothing here opens weights or activations."""

import csv
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from mechint.config import SAETrainConfig
from mechint.errors import MechintError
from mechint.eval import read_metrics_csv
from mechint.formats.files import WEIGHTS
from mechint.inside import folder_of_ours, run_of
from mechint.provenance import read_json
from mechint.runs import Run
from mechint.sae import SAE

# Fields of the settings that say where things are, not what was done.
PLACES = frozenset({"activations_path", "runs_root", "run_name", "device", "track", "log_every", "save_every"})
CURVES = ("step", "loss", "mse", "fvu", "l0_count", "dead_features", "dead", "dense", "lr")
MAX_CURVE_POINTS = 400
# Columns that are text even where it looks like a number: a concept may be called "nan".
TEXT = frozenset({"concept", "parent", "sample"})
# Objects of eval.json that the page shows.
SHOWN_OBJECTS = frozenset({"ci95", "without_special", "without_outliers", "l0_histogram", "density_histogram"})


def check_finished(path: str | Path) -> Run:
    """The run at `path`.

    Raises:
        MechintError: not a run directory, one that is empty, or one that is still training; names the next command.
    """
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        raise MechintError(f"{path} is empty: no run was trained there; `python scripts/train_sae.py` makes one")
    run = Run(path)
    if not run.is_done:
        at = _steps_so_far(run)
        raise MechintError(
            f"{path} is not finished{at}: wait until its training ends, or go on with"
            f" `python scripts/train_sae.py --resume {shlex.quote(str(path))}`"
        )
    return run


@final
@dataclass(frozen=True)
class Reported:
    """What a report is about: a finished run, or an SAE that was not trained here.

    Attributes:
        named: the SAE as it is typed.
        path: the folder that holds what was measured of it.
        run: None for an SAE that is no run of ours.
    """

    named: str
    path: Path
    run: Run | None = None


def reported(named: str | Path, output: Path | None) -> Reported:
    """What `named` is. Results on an SAE of others are looked for where `output`, the report's file, lies.

    Raises:
        MechintError: as `check_finished`; an SAE of others without `output`.
    """
    path = Path(named)
    if path.is_dir():
        weights = any((path / name).is_file() for name in WEIGHTS)
        if run_of(path) is not None or (not weights and folder_of_ours(path) is None):
            run = check_finished(path)
            return Reported(str(named), run.path, run)
    folder = folder_of_ours(path) if path.exists() else None
    folder = folder or (None if output is None else output.parent)
    if folder is None:
        if not path.exists():
            raise MechintError(
                f"run directory not found: {named}; `ls runs` shows yours, and an SAE of the Hub needs --output"
            )
        raise MechintError(
            f"{named} is no folder that mechint wrote, so nothing is written into it: give --output for the report"
        )
    return Reported(str(named), folder)


def _steps_so_far(run: Run) -> str:
    try:
        rows = read_metrics_csv(run.metrics_path)
        return f" (step {rows[-1]['step']:,} of {run.config.steps:,})" if rows else ""
    except (MechintError, TypeError):
        return ""


def run_facts(run: Run) -> dict[str, Any]:
    """What the report's first screen needs of a finished run, as JSON values; missing files are named in `missing`.

    Keys: name, model, hook, data, architecture, d_in, d_sae, settings (those that differ from the defaults), curves,
    quality, concepts, ranking, provenance, missing ({what, command} each).
    """
    config, manifest, summary = run.config, run.manifest, run.summary
    quality = {key: value for key, value in summary.items() if isinstance(value, (int, float))}
    measured = _measured(Reported(str(run.path), run.path, run), quality)
    quality = measured["quality"]
    source = manifest.get("inputs", {}).get("activations", {})
    d_sae = int(quality.get("num_features") or config.num_features)
    facts = {
        "name": run.path.resolve().name,
        "model": config.model_name or "a model that is not recorded",
        "hook": config.hook_name or "a hook that is not recorded",
        "dataset": source.get("dataset_name") or config.dataset_name or "texts that are not recorded",
        "n_rows": source.get("n_rows"),
        "architecture": config.architecture,
        "d_in": config.activation_dim,
        "d_sae": d_sae,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "sparsity": sparsity_words(config),
        "settings": changed_settings(config),
        "all_settings": {name: _shown(value) for name, value in config.to_dict().items()},
        "curves": _curves(run, d_sae),
        "provenance": _provenance(run, manifest, source),
        "check": f"mechint verify {_quoted(run.path)}",
        **measured,
    }
    return facts


def sae_facts(place: Reported, sae: SAE) -> dict[str, Any]:
    """`run_facts` of an SAE that was not trained here: what its files say, and what was measured of it."""
    said = sae.metadata
    cfg = {key: value for key, value in sae.cfg.to_dict().items() if key not in ("metadata", "device")}
    lines = [(name.replace("_", " "), said.get(name)) for name in ("model_name", "hook_name", "hook_name_out")]
    lines += [(name.replace("_", " "), said.get(name)) for name in ("processing", "prepend_bos", "dataset_path")]
    return {
        "name": Path(place.named).name,
        "model": said.get("model_name") or "a model that is not recorded",
        "hook": sae.hook_in or "a hook that is not recorded",
        "dataset": said.get("dataset_path") or said.get("dataset_name") or "texts that are not recorded",
        "n_rows": None,
        "architecture": str(sae.cfg.architecture),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "steps": None,
        "batch_size": None,
        "sparsity": f"k = {sae.cfg.k:g}" if sae.cfg.k is not None else "not recorded",
        "settings": [],
        "all_settings": {name: _shown(value) for name, value in cfg.items()},
        "curves": {},
        "provenance": [[label, str(value)] for label, value in (("SAE", place.named), *lines) if value is not None],
        "check": f"mechint identify {shlex.quote(place.named)}",
        **_measured(place, {"num_features": sae.d_sae}),
    }


def _measured(place: Reported, quality: dict[str, Any]) -> dict[str, Any]:
    """`quality` (with what is known of it already), `evaluated`, `concepts`, `ranking`; what is not there is named in
    `missing`."""
    missing: list[dict[str, str]] = []
    command = f"eval {shlex.quote(place.named)} --output {_quoted(place.path / 'eval.json')}"
    evaluated = _optional_json(place, "eval.json", missing, "how well the model works with it", command)
    quality = quality | (evaluated or {})
    return {
        "quality": {
            key: value
            for key, value in quality.items()
            if isinstance(value, (int, float)) or key in SHOWN_OBJECTS or key == "rows"
        },
        "evaluated": evaluated is not None,
        "concepts": _concepts(place, missing),
        "ranking": _ranking(place, missing),
        "missing": missing,
    }


def sparsity_words(config: SAETrainConfig) -> str:
    """What decides how sparse the code is."""
    for name, text in (("k", "k = {:g}"), ("target_l0", "target L0 {:g}")):
        if (value := getattr(config, name)) is not None:
            return text.format(value)
    return f"penalty weight {config.l1_lambda:g}"


def changed_settings(config: SAETrainConfig) -> list[dict[str, str]]:
    """The settings that are not the defaults: name, value, default, as text."""
    ours, defaults = config.to_dict(), SAETrainConfig().to_dict()
    width = "expansion" if config.expansion is None else "d_sae"  # the way that it is not said in
    return [
        {"name": name, "value": _shown(value), "default": _shown(defaults[name])}
        for name, value in ours.items()
        if value != defaults[name] and name not in PLACES | {width}
    ]


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _curves(run: Run, d_sae: int) -> dict[str, list[float | int | None]]:
    """Columns of metrics.csv, thinned out evenly to at most 400 rows, the last one kept."""
    rows = read_metrics_csv(run.metrics_path)
    stride = max(1, math.ceil(len(rows) / MAX_CURVE_POINTS))
    rows = [row for index, row in enumerate(rows) if index % stride == 0 or index == len(rows) - 1]
    found = {name: [row.get(name) for row in rows] for name in CURVES}
    if all(value is None for value in found["l0_count"]):  # older files have the fraction only
        found["l0_count"] = [None if row["l0"] is None else row["l0"] * d_sae for row in rows]
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def _provenance(run: Run, manifest: dict[str, Any], source: dict[str, Any]) -> list[list[str]]:
    """Label and value, in the order in which one thing was made from the other."""
    outputs = manifest.get("outputs", {})
    versions = manifest.get("versions", {})
    lines = [
        ("data set", source.get("dataset_name") or run.config.dataset_name),
        ("data revision", source.get("dataset_revision")),
        ("texts, SHA-256", source.get("texts_sha256")),
        ("model", source.get("model_source") or run.config.model_name),
        ("model revision", source.get("model_revision")),
        ("model weights, SHA-256", source.get("model_sha256")),
        ("activations", source.get("path")),
        ("activations, SHA-256", source.get("sha256")),
        ("config.json, SHA-256", outputs.get("config.json")),
        ("checkpoint.pt, SHA-256", outputs.get("checkpoint.pt")),
        ("commit that trained", manifest.get("git_commit")),
        ("device, kernel", ", ".join(str(manifest[key]) for key in ("device", "kernel") if manifest.get(key))),
        ("resumed at step", ", ".join(map(str, manifest.get("resumed_at", [])))),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))),
    ]
    return [[label, str(value)] for label, value in lines if value]


def _optional_json(
    place: Reported, name: str, missing: list[dict[str, str]] | None, what: str, command: str
) -> dict[str, Any] | None:
    """A JSON object of the run; None where it is not there or cannot be read, which `missing` then says."""
    path = place.path / name
    why = "has not been measured"
    if path.is_file():
        try:
            return read_json(path, name)
        except MechintError as error:
            why = f"cannot be read: {error}"
    if missing is not None:
        missing.append({"what": f"{what} ({name}) {why}", "command": f"mechint {command}"})
    return None


def _quoted(path: Path) -> str:
    """A path as a word of a command line."""
    return shlex.quote(str(path))


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV with numbers as numbers, empty cells as None; no rows if there is no such file."""
    if not path.is_file():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [
                {key: cell if key in TEXT else _value(cell) for key, cell in row.items() if key is not None}
                for row in csv.DictReader(file)
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MechintError(f"table {path} cannot be read: {error}") from error


def _value(cell: Any) -> Any:
    if cell is None or cell == "":
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        return cell


def _concepts(place: Reported, missing: list[dict[str, str]]) -> dict[str, Any] | None:
    rows = _rows(place.path / "concepts.csv")
    if not rows:
        command = f"mechint concepts {shlex.quote(place.named)}"
        what = "which latents match known concepts (concepts.csv) has not been measured"
        missing.append({"what": what, "command": command})
        return None
    rows.sort(key=lambda row: -(number(row.get("f1")) or 0.0))
    summary = _optional_json(place, "concepts.json", None, "", "") or {}
    return {"rows": rows, "summary": {k: v for k, v in summary.items() if isinstance(v, (int, float, dict))}}


def _ranking(place: Reported, missing: list[dict[str, str]]) -> dict[str, Any] | None:
    """What ranking.json says, in words: `lead`, `reading`, `correlation_text`, `attribution_label`."""
    if not (place.path / "ranking.csv").is_file():
        what = "the fast causal ranking of all latents (ranking.csv), with its check, has not been made"
        missing.append({"what": what, "command": f"mechint rank {shlex.quote(place.named)}"})
        return None
    record = _optional_json(place, "ranking.json", None, "", "") or {}
    found: dict[str, Any] = {"attribution_label": "estimated KL when removed, nats a token (log)"}
    if (record.get("settings") or {}).get("by") == "ce":
        found["attribution_label"] = "estimated change of the loss when removed, nats a token (log)"
    n_tokens, n_exact = number(record.get("n_tokens")), number(record.get("n_exact_latents"))
    if n_tokens and n_exact:
        found["lead"] = (
            f"All latents are ranked by a fast estimate of what removing each does, over {n_tokens:,.0f} tokens;"
            f" {n_exact:,.0f} of them were then really removed, to see how far the estimate can be trusted."
        )
    correlations = record.get("spearman") or {}
    parts = []
    values = {name: number((correlations.get(name) or {}).get("value")) for name in ("control", "top")}
    for name, words in (("control", "{:,.0f} latents drawn at random"), ("top", "the first {:,.0f} of the ranking")):
        one = correlations.get(name) or {}
        value, low, high, n = (number(one.get(key)) for key in ("value", "low", "high", "n"))
        if value is None:
            continue
        interval = "" if low is None or high is None else f" (95 % interval {low:.2f} to {high:.2f})"
        parts.append(f"{value:.2f}{interval} among {words.format(n or 0)}")
    if values["control"] is not None:
        found["reading"] = _trust(values["control"], values["top"])
    if parts:
        found["correlation_text"] = f"Rank correlation of estimate and exact effect: {'; '.join(parts)}."
    return found


def _trust(control: float, top: float | None) -> str:
    """What rank correlations on random latents and on the first ones allow to conclude."""
    if control < 0.5:
        return "The fast estimate is a poor guide here"
    ordered = "" if top is None or top >= 0.7 else ", but orders the first ones badly"
    return f"The fast estimate tells strong latents from weak ones{ordered}"


def number(value: Any) -> float | None:
    """`value` as a float if it is a finite number, else None."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def latent_effects(run: Run | Reported) -> dict[str, dict[int, float]]:
    """By name, latent -> value, of ranking.csv and ablation.csv.

    `attribution`: the fast estimate; `exact`: mean KL of the latents that were removed beside it, on the same texts;
    `control`: 1 for those drawn at random; `effect`: the exact mean KL of whichever file measured more latents.
    """
    found: dict[str, dict[int, float]] = {"attribution": {}, "exact": {}, "control": {}}
    for row in _rows(run.path / "ranking.csv"):
        latent = _latent(row, run.path / "ranking.csv")
        for name, column in (("attribution", "attribution"), ("exact", "exact_kl")):
            if (value := number(row.get(column))) is not None:
                found[name][latent] = value
        if row.get("sample") == "control":
            found["control"][latent] = 1.0
    table = run.path / "ablation.csv"
    whole = {_latent(row, table): value for row in _rows(table) if (value := number(row.get("mean_kl"))) is not None}
    return {**found, "effect": max(whole, found["exact"], key=len)}


def _latent(row: dict[str, Any], path: Path) -> int:
    value = number(row.get("feature_idx"))
    if value is None or value != int(value) or value < 0:
        raise MechintError(f"{path}: feature_idx should be the number of a latent, found {row.get('feature_idx')!r}")
    return int(value)


def latent_concepts(run: Run | Reported) -> dict[int, tuple[str, float]]:
    """Latent -> (its best concept, F1), of latent_concepts.csv; empty without it."""
    path = run.path / "latent_concepts.csv"
    found = {}
    for row in _rows(path):
        if row.get("concept") is not None and (f1 := number(row.get("f1"))) is not None:
            found[_latent(row, path)] = (row["concept"], f1)
    return found


def shown(quality: dict[str, Any], key: str) -> float | None:
    """A metric as it is shown first. A few rows of extreme norm can make up all of an FVU, so that is the one without
    outliers where there are any."""
    rows = quality.get("without_outliers") if key == "fvu" else None
    return number((rows or quality).get(key))


def facts_text(facts: dict[str, Any]) -> str:
    """One sentence that says what the run is; the page's description."""
    quality = facts["quality"]
    text = (
        f"{facts['name']}: a {facts['architecture']} sparse autoencoder with {facts['d_sae']:,} latents on"
        f" {facts['hook']} of {facts['model']} ({facts['d_in']} dimensions)"
    )
    parts = []
    if (l0 := number(quality.get("l0"))) is not None:
        parts.append(f"L0 {l0:.1f}")
    if (fvu := shown(quality, "fvu")) is not None:
        parts.append(f"{100 * fvu:.1f} % of the variance unexplained")
    if (recovered := number(quality.get("ce_recovered_mean"))) is not None:
        parts.append(f"{100 * recovered:.2f} % of the cross-entropy recovered against mean ablation")
    return text + (f". Held-out: {', '.join(parts)}." if parts else ".")
