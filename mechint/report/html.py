"""`make_report`: from run directories to one HTML file, and to figures for papers."""

import datetime
import hashlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from mechint.analysis import Latents
from mechint.analysis.latents import kept_or_gathered
from mechint.config import ReportConfig
from mechint.data.store import Activations, open_activations
from mechint.errors import MechintError, one_line
from mechint.inside import check_same_setting, open_sae, put_inside
from mechint.models import LanguageModel
from mechint.provenance import check_output_path, get_git_commit, sha256_file, write_text
from mechint.report import facts as run_files
from mechint.report.latents import Look, contexts_of, look, spelled, strata_names
from mechint.report.pack import pack
from mechint.report.page import page
from mechint.report.side_by_side import compare_facts
from mechint.report.story import story
from mechint.sae import SAE

# Shares of the contexts asked for that are tried until the file is small enough.
SMALLER = (1.0, 0.6, 0.4, 0.25, 0.12, 0.0)
FOLDER = "figures"


@final
class Made(NamedTuple):
    """What `make_report` wrote, and what it took."""

    path: Path
    n_bytes: int
    figures: list[Path]
    seconds: float
    gather_seconds: float  # of the passes over activations that had to be made
    notes: list[str]


@final
class _Opened(NamedTuple):
    place: run_files.Reported
    facts: dict[str, Any]
    sae: SAE
    model: LanguageModel | None
    activations: Activations | None
    gathered: Latents | None


def make_report(config: ReportConfig, *, progress: bool = False) -> Made:
    """Write the report of `config.runs`, and `figures/` in the run if it is one.

    Everything that can be wrong with the runs and the outputs is checked before the first weights are read.

    Raises:
        MechintError: a run that is empty, unfinished or none; outputs that exist; a --model that cannot be loaded.
    """
    started = time.perf_counter()
    places = [run_files.reported(path, config.output) for path in config.runs]
    output = config.output or places[0].path / "report.html"
    if output.suffix.lower() not in (".html", ".htm"):
        raise MechintError(f"--output {output} should end in .html")
    check_output_path(output)
    own_figures = config.figures and len(places) == 1  # a page about several changes nothing in them
    if not config.overwrite:
        if output.exists():
            raise MechintError(f"{output} exists: --overwrite replaces it, --output writes elsewhere")
        folder = places[0].path / FOLDER
        if own_figures and folder.exists():
            raise MechintError(f"{folder} exists: --overwrite replaces its figures, --no-figures leaves them alone")
    opened, gather_seconds, notes = [], 0.0, []
    for place in places:
        one, seconds = _open(place, config, notes, progress)
        opened.append(one)
        gather_seconds += seconds
    looks = [_look(one, notes) for one in opened]
    for one, shown in zip(opened, looks, strict=True):
        arrays = None if shown is None else shown.arrays
        one.facts["story"] = story(one.facts, arrays, 0 if one.gathered is None else one.gathered.n_rows)
        one.facts["examples"] = [] if shown is None else examples(shown)
    all_facts = [one.facts for one in opened]
    facts: dict[str, Any] = {
        "made": _made(),
        "runs": all_facts,
        "title": f"{all_facts[0]['name']} \u2013 mechint report",
    }
    if len(opened) > 1:
        facts["compare"] = compare_facts(all_facts, [one.sae for one in opened], looks)
        facts["title"] = f"{facts['compare']['title']} \u2013 mechint report"
    text = _fitting_page(facts, opened, looks, config)
    write_text(output, text, overwrite=True)
    figures: list[Path] = []
    if own_figures:
        from mechint.report.files import write_figures

        figures = write_figures(opened[0].place, opened[0].facts, opened[0].sae, opened[0].gathered, looks[0])
    for shown in looks:
        notes += [] if shown is None else [note for note in shown.notes if note not in notes]
    return Made(output, len(text.encode("utf-8")), figures, time.perf_counter() - started, gather_seconds, notes)


def _made() -> dict[str, str]:
    from mechint import __version__

    return {"version": __version__, "commit": get_git_commit(), "date": datetime.date.today().isoformat()}


def _open(place: run_files.Reported, config: ReportConfig, notes: list[str], progress: bool) -> tuple[_Opened, float]:
    """The SAE with its facts; model and activations where they are to be had, else a line in `missing`."""
    run = place.run
    sae = open_sae(Path(place.named) if run is None else run.checkpoint_path)
    facts = run_files.sae_facts(place, sae) if run is None else run_files.run_facts(run)
    missing, again = facts["missing"], f"mechint report {shlex.quote(place.named)} --overwrite"
    model: LanguageModel | None = None
    try:
        inside = put_inside(sae, Path(place.named), run=run, model=config.model, device=config.device, notes=sae.notes)
    except MechintError as error:
        if config.model is not None:
            raise
        why = f"tokens are shown as numbers, and output tokens not at all: {one_line(error)}"
        missing.append({"what": why, "command": f"{again} --model NAME"})
    else:
        sae = inside.sae
        model = inside.model if isinstance(inside.model, LanguageModel) else None
        notes += [f"{place.named}: {note}" for note in inside.notes]
    activations, gathered, seconds = None, None, 0.0
    try:
        if config.activations_path is not None:
            activations = open_activations(config.activations_path)
        elif run is not None:
            activations = open_activations(run.activations_path())
        else:
            raise MechintError("give --activations-path, the activations to look at them on")
        if run is None or config.activations_path is not None:  # a run's own are those that it was trained on
            check_same_setting(sae, activations, Path(place.named))
        began = time.perf_counter()
        weights = sha256_file(run.checkpoint_path) if run is not None else _weights_sha256(sae)
        gathered = kept_or_gathered(sae, activations, place.path, weights, progress=progress)
        seconds = time.perf_counter() - began
    except MechintError as error:
        if config.activations_path is not None:
            raise
        command = "" if run is not None else f"{again} --activations-path ACTIVATIONS"
        missing.append({"what": f"latents are not shown: {one_line(error)}", "command": command})
        activations = None
    return _Opened(place, facts, sae, model, activations, gathered), seconds


def _weights_sha256(sae: SAE) -> str:
    """Hex SHA-256 over names and bytes of the weights, of an SAE whose file may be of any format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.weights().items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _look(one: _Opened, notes: list[str]) -> Look | None:
    if one.gathered is None or one.activations is None:
        return None
    return look(
        one.sae,
        one.gathered,
        one.activations,
        one.model,
        effects=run_files.latent_effects(one.place),
        concepts=run_files.latent_concepts(one.place),
    )


def _fitting_page(
    facts: dict[str, Any], opened: Sequence[_Opened], looks: Sequence[Look | None], config: ReportConfig
) -> str:
    """The page with as many contexts as fit into --max-megabytes; says so where they are fewer than asked for."""
    text = ""
    for part in SMALLER:
        n_top = max(1, round(config.top_contexts * part)) if part else 0
        n_quantile = round(config.quantile_contexts * part)
        blobs = [
            None if shown is None else _blob(one, shown, n_top, n_quantile, config.window, asked=part == 1.0)
            for one, shown in zip(opened, looks, strict=True)
        ]
        description = " ".join(run_files.facts_text(one.facts) for one in opened)
        text = page(facts, blobs, title=facts["title"], description=description, version=facts["made"]["version"])
        if len(text.encode("utf-8")) <= config.max_megabytes * 1e6:
            return text
    size = len(text.encode("utf-8")) / 1e6
    raise MechintError(
        f"the report takes {size:.1f} MB even without contexts, more than --max-megabytes {config.max_megabytes:g}"
    )


def _blob(one: _Opened, shown: Look, n_top: int, n_quantile: int, window: int, *, asked: bool) -> str:
    arrays, tokens, starts = dict(shown.arrays), dict(shown.tokens), None
    header = {**shown.header, "strata": [], "strata_note": "", "notes": shown.notes}
    assert one.activations is not None and one.gathered is not None
    if one.activations.tokens is not None and n_top:
        found = contexts_of(one.sae, one.gathered, one.activations, n_top=n_top, n_quantile=n_quantile, window=window)
        arrays |= found.arrays
        tokens["stream"], starts = found.stream, found.starts
        settings = one.gathered.settings
        header["strata"] = strata_names(settings.n_strata)
        header["strata_note"] = (
            f"Random examples out of {settings.n_sample} tokens on which it fires (all, where there are fewer)."
        )
    else:
        arrays["ctx_first"] = np.zeros(one.sae.d_sae + 1, np.uint32)
    if not asked:
        header["contexts_note"] = "Contexts were left out to keep this file small (--max-megabytes)."
        header["notes"] = [
            *shown.notes,
            f"To keep this file small, {n_top} strongest contexts of each latent are shown.",
        ]
    placed, header["vocab"] = spelled(tokens, one.model, starts)
    return pack(header, arrays | placed)


def examples(shown: Look, most: int = 6) -> list[dict[str, Any]]:
    """Latents for the first screen, each by a rule that its card tells: largest effects, best concepts, extremes."""
    arrays, header = shown.arrays, shown.header
    fires, n_rows = arrays["fires"].astype(np.int64), header["n_rows"]
    found: dict[int, str] = {}

    def add(latent: int, why: str) -> None:
        if fires[latent] > 0 and len(found) < most:
            found.setdefault(int(latent), why)

    words = (shown.tokens["label"] != 0xFFFFFFFF).sum(axis=1)
    for latent in _best(arrays["effect"])[:2]:
        rank = "largest" if not found else "second largest"
        add(
            latent,
            f"The {rank} effect on the model: removing it changes predictions by {arrays['effect'][latent]:.3g} nats.",
        )
    matched = np.where((arrays["concept"] >= 0) & (words == words.max()), arrays["concept_f1"], np.nan)
    seen: set[int] = set()
    for latent in _best(matched):
        concept = int(arrays["concept"][latent])
        if len(seen) < 2 and concept not in seen:
            seen.add(concept)
            name, f1 = header["concepts"][concept], arrays["concept_f1"][latent]
            add(
                latent,
                f"A best match among latents that fire on several words: concept \u201c{name}\u201d, F1 {f1:.2f}.",
            )
    for latent in _best(fires.astype(np.float64))[:1]:
        add(latent, f"The densest latent: it fires on {100 * fires[latent] / n_rows:.0f} % of tokens.")
    for latent in _best(np.where((fires >= 20) & (arrays["consistency"] == 255), arrays["max"], 0.0))[:1]:
        add(latent, "The strongest of the latents whose strongest contexts all fire on one token.")
    for latent in _best(arrays["max"])[:most]:
        add(latent, f"Among the highest activations of all: up to {arrays['max'][latent]:.3g}.")
    return [{"latent": latent, "why": why} for latent, why in found.items()]


def _best(values: np.ndarray) -> list[int]:
    """Numbers of the finite values above 0, highest first."""
    usable = np.where(np.isfinite(values), values, 0.0)
    order = np.argsort(-usable, kind="stable")
    return order[usable[order] > 0].tolist()


def print_made(made: Made) -> None:
    """What was written, to stdout; what was assumed, to stderr."""
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    for path in made.figures:
        print(f"figure: {path}")
    print(f"report: {made.path} ({made.n_bytes / 1e6:.2f} MB, {made.seconds:.0f} s); open it in a browser")
