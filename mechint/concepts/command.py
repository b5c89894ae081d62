"""`score_concepts`: from a run directory to concepts.csv, latent_concepts.csv and concepts.json."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechint.concepts.labels import Labelled, label_stored, label_tales, label_texts, stored_texts, write_texts
from mechint.concepts.score import (
    DictionaryScores,
    Task,
    baselines,
    dense_probes,
    make_task,
    score_dictionary,
    token_f1,
)
from mechint.concepts.spans import SpanFile, read_span_file
from mechint.concepts.table import concept_rows, latent_rows, summary, write_csv
from mechint.config import ConceptsConfig
from mechint.data.store import Activations, open_activations
from mechint.errors import MechintError
from mechint.inside import Inside, check_same_setting, named_sae, open_named, output_folder, place_of, run_of
from mechint.provenance import check_output_path, get_git_commit, sha256_file, write_json, write_text

FILES = ("concepts.csv", "latent_concepts.csv", "concepts.json")


@dataclass(frozen=True)
class Concepts:
    """What was written, and its content: a row a concept, a row a latent, and the summary of concepts.json."""

    folder: Path
    concepts: list[dict[str, Any]]
    latents: list[dict[str, Any]]
    summary: dict[str, Any]


def score_concepts(
    config: ConceptsConfig, *, progress: bool = False, on_note: Callable[[str], None] = lambda note: None
) -> Concepts:
    """Score what `config` names and write the three files. `on_note` is told in words what was assumed or left out.

    Raises:
        MechintError: nothing to score, files that are missing, broken or do not belong together, a run still training,
            labels that match no token, too few labels, existing files without `overwrite`.
    """
    config = named_sae(config)
    path = place_of(config)
    folder = _output_folder(config)
    file = None if config.labels is None else read_span_file(config.labels)
    rows = _activations(config, file, path)
    if file is None and rows is not None and rows.info.get("dataset_name") != "builtin/tales":
        label_tales(rows, None)  # says what is missing before the model is loaded
    started = time.perf_counter()
    inside = open_named(config)
    for note in inside.notes:
        on_note(note)
    labelled = _labelled(config, file, rows, inside, progress)
    for note in labelled.notes:
        on_note(note)
    task = make_task(labelled, seed=config.seed, min_tokens=config.min_tokens)
    found, others, dense, token = _score(config, task, inside, progress)
    result = Concepts(
        folder,
        concept_rows(task, found, others, dense, token),
        latent_rows(task, found),
        {
            **summary(task, found, others, dense, token),
            "settings": config.to_dict(),
            "checkpoint": str(inside.checkpoint),
            "checkpoint_sha256": sha256_file(inside.checkpoint) if inside.checkpoint.is_file() else None,
            "activations_sha256": rows.sha256 if rows is not None else None,
            "git_commit": get_git_commit(),
            "notes": [*inside.notes, *labelled.notes],
            "seconds": time.perf_counter() - started,
        },
    )
    write_text(folder / FILES[0], write_csv(result.concepts), overwrite=config.overwrite)
    write_text(folder / FILES[1], write_csv(result.latents), overwrite=config.overwrite)
    write_json(folder / FILES[2], result.summary, overwrite=config.overwrite)
    return result


def write_label_texts(config: ConceptsConfig) -> int:
    """Write the texts of the activations to `config.texts_output`. Returns how many.

    Raises:
        MechintError: no activations with tokens, an existing file without `overwrite`.
    """
    assert config.texts_output is not None
    if config.texts_output.exists() and not config.overwrite:
        raise MechintError(f"{config.texts_output} exists: give another --texts-output, or --overwrite to replace it")
    check_output_path(config.texts_output)
    config = named_sae(config)
    rows = _activations(config, None, place_of(config))
    assert rows is not None
    inside = open_named(config)
    texts = stored_texts(rows, inside.model.tokenizer, config.max_texts)
    write_texts(config.texts_output, texts, overwrite=config.overwrite)
    return len(texts)


def _output_folder(config: ConceptsConfig) -> Path:
    folder = config.output_dir or output_folder(config, "--output-dir")
    for name in FILES:
        if (folder / name).exists() and not config.overwrite:
            raise MechintError(f"{folder / name} exists: give another --output-dir, or --overwrite to replace it")
        check_output_path(folder / name)
    if config.min_tokens < 1 or (config.max_texts is not None and config.max_texts < 2):
        raise MechintError("--min-tokens must be at least 1, and --max-texts at least 2")
    return folder


def _activations(config: ConceptsConfig, file: SpanFile | None, path: Path) -> Activations | None:
    """The activations that are labelled; None where the labels bring their own texts."""
    if file is not None and file.by == "text":
        return None
    if config.activations_path is not None:
        return open_activations(config.activations_path)
    if (run := run_of(path)) is not None:
        return open_activations(run.activations_path())
    raise MechintError(f"{path} does not lie in a run directory: give the activations with --activations-path")


def _labelled(
    config: ConceptsConfig, file: SpanFile | None, rows: Activations | None, inside: Inside, progress: bool
) -> Labelled:
    if rows is None:
        assert file is not None
        return label_texts(inside, file, span_tokens=config.span_tokens, progress=progress)
    check_same_setting(inside.sae, rows, inside.checkpoint)
    tokenizer = inside.model.tokenizer
    if file is not None:
        return label_stored(rows, tokenizer, file, span_tokens=config.span_tokens)
    return label_tales(rows, tokenizer, span_tokens=config.span_tokens, max_texts=config.max_texts)


def _score(
    config: ConceptsConfig, task: Task, inside: Inside, progress: bool
) -> tuple[DictionaryScores, dict[str, DictionaryScores], Any, Any]:
    from tqdm import tqdm

    stages = ["tokens"] + ["sae"] + ["random", "pca"] * config.baselines + ["dense probe"] * config.probes
    with tqdm(total=len(stages), desc="concepts", unit="stage", disable=not progress, leave=False) as bar:
        token = token_f1(task)
        bar.update()
        device = inside.model.device
        ks = {} if config.probes else {"ks": ()}
        found = score_dictionary(
            task,
            lambda x: inside.sae.encode(x.to(device)),
            W_dec=None if inside.sae.is_transcoder else inside.sae.W_dec,  # concepts' directions are those of the input
            on_stage=lambda stage: bar.set_postfix_str(f"sae: {stage}"),
            **ks,
        )
        bar.update()
        others: dict[str, DictionaryScores] = {}
        if config.baselines:
            others = baselines(task, found.d_sae, found.l0, **ks)
            bar.update(2)
        dense = dense_probes(task) if config.probes else None
    return found, others, dense, token
