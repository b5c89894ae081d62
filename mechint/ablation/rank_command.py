"""`rank`: from a run directory to ranking.csv and ranking.json, as the command line asks for it."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechint.ablation.causal import RANKING_COLUMNS, Partial, rank_latents
from mechint.ablation.command import fingerprint_of
from mechint.ablation.rank import feature_indices
from mechint.config import RankConfig
from mechint.data import open_activations
from mechint.data.batches import split_as
from mechint.data.documents import Document
from mechint.data.text import documents_from
from mechint.errors import MechintError
from mechint.eval import Text, texts_from_rows
from mechint.eval.given import given_texts
from mechint.inside import Inside, check_same_setting, named_sae, open_named, output_folder
from mechint.provenance import atomic_path, check_output_path, get_git_commit, write_json
from mechint.sae import SAE


@dataclass(frozen=True)
class Ranking:
    """The rows and the summary that were written, where, and in words what was assumed."""

    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    output: Path
    notes: tuple[str, ...]


def summary_path(output: Path) -> Path:
    """The .json that belongs to a ranking's CSV."""
    return output.with_suffix(".json")


def rank_run(
    config: RankConfig, *, progress: bool = True, on_note: Callable[[str], None] = lambda note: None
) -> Ranking:
    """Rank the latents of a run and write the CSV and its summary. See `mechint.ablation.causal`.

    Everything that can be wrong is checked before the model is loaded, as far as it can be, and the rest before the
    first pass. `on_note` is given what was assumed, in words, before the work begins.

    Raises:
        MechintError: an existing output without `overwrite`, a run that is not finished, files that are missing or
            broken, fewer texts than asked for, a latent out of range, an SAE that does not fit model or hook.
    """
    config = named_sae(config)
    output = config.output or output_folder(config, "--output") / "ranking.csv"
    _check_settings(config, output)
    given = None
    if config.eval_texts_path is not None:
        given = documents_from(config.eval_texts_path, config.text_field, config.unit, limit=config.num_texts)
        _check_count(config, len(given), str(config.eval_texts_path))

    def check(sae: SAE) -> None:
        if config.latents is not None:
            feature_indices(config.latents, sae.d_sae)

    inside = open_named(config, check=check)
    latents = [] if config.latents is None else feature_indices(config.latents, inside.sae.d_sae)
    found, notes = _texts(config, inside, given)
    for note in (*inside.notes, *notes):
        on_note(note)
    partial = Partial(
        output,
        fingerprint_of(
            inside,
            texts=[[text.tokens, text.seen] for text in found],
            draws=config.draws,
            seed=config.seed,
            exact_texts=config.exact_texts,
            layout=1,
        ),
    )
    rows, summary = rank_latents(
        inside.sae,
        inside.model,
        inside.hook_name,
        found,
        by=config.by,
        draws=config.draws,
        top=config.top,
        control=config.control,
        latents=latents,
        exact_texts=config.exact_texts,
        seed=config.seed,
        batch_size=config.batch_size,
        progress=progress,
        partial=partial,
    )
    summary = {
        **summary,
        "settings": config.to_dict(),
        "checkpoint": str(inside.checkpoint),
        "model_name": inside.model.name,
        "hook_name": inside.hook_name,
        "git_commit": get_git_commit(),
    }
    save_ranking(rows, output)
    write_json(summary_path(output), summary)
    partial.remove()
    return Ranking(rows, summary, output, (*inside.notes, *notes))


def save_ranking(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the rows as CSV, atomically; what was not measured is an empty cell."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=RANKING_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _check_settings(config: RankConfig, output: Path) -> None:
    for path in (output, summary_path(output)):
        if path.exists() and not config.overwrite:
            raise MechintError(f"{path} exists: give another --output, or --overwrite to replace it")
        check_output_path(path)
    if output.suffix == ".json":
        raise MechintError(f"--output {output} should be a .csv; its .json is written beside it")
    least = {"num_texts": 1, "draws": 0, "top": 0, "control": 0, "exact_texts": 1, "batch_size": 1}
    for name, lowest in least.items():
        value = getattr(config, name)
        if value is not None and value < lowest:
            raise MechintError(f"--{name.replace('_', '-')} must be at least {lowest}, got {value}")
    if config.by == "kl" and config.draws == 0:
        raise MechintError("ranking by KL needs --draws 1 at least; --by ce needs none")


def _check_count(config: RankConfig, n: int, where: str) -> None:
    if config.num_texts is not None and config.num_texts > n:
        raise MechintError(
            f"--num-texts {config.num_texts}, but {where} has {n}: ask for {n} or fewer, or give more with"
            " --eval-texts-path"
        )


def _texts(config: RankConfig, inside: Inside, given: list[Document] | None) -> tuple[list[Text], list[str]]:
    """The texts to rank on: those given, else those that the run held out, from its activations' stored tokens."""
    notes: list[str] = []
    if given is not None:
        found, told = given_texts(inside, given)
        notes += told
    else:
        path = config.activations_path or (None if inside.run is None else inside.run.activations_path())
        if path is None:
            raise MechintError(
                f"{inside.checkpoint} lies in no run directory, so its texts are not known: give --eval-texts-path or"
                " --activations-path"
            )
        activations = open_activations(path)
        check_same_setting(inside.sae, activations, inside.checkpoint)
        settings = None if inside.run is None else inside.run.config
        held_out = None
        if settings is None or settings.val_fraction == 0:
            notes.append(f"no texts are known to be held out: those of all rows of {path} are used, training's too")
        else:
            _, held_out = split_as(settings, activations)
        found = texts_from_rows(activations, held_out)
        _check_count(config, len(found), f"the held-out part of {path}" if held_out is not None else str(path))
        found = found[: config.num_texts]
        inside.check_tokens(max(max(text.tokens) for text in found), path)
    if len(found) < config.exact_texts:
        notes.append(f"--exact-texts {config.exact_texts}, but there are {len(found)} texts: all of them are used")
    return found, notes
