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
from mechint.eval.checkpoint import check_same_setting
from mechint.provenance import check_output_path, get_git_commit, sha256_file, write_json, write_text
from mechint.runs import Run
from mechint.subject import Subject, open_subject

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
    path = _checkpoint(config)
    folder = _output_folder(config, path)
    file = None if config.labels is None else read_span_file(config.labels)
    rows = _activations(config, file, path)
    if file is None and rows is not None and rows.info.get("dataset_name") != "builtin/tales":
        label_tales(rows, None)  # says what is missing before the model is loaded
    started = time.perf_counter()
    subject = open_subject(path, device=config.device)
    for note in subject.notes:
        on_note(note)
    labelled = _labelled(config, file, rows, subject, progress)
    for note in labelled.notes:
        on_note(note)
    task = make_task(labelled, seed=config.seed, min_tokens=config.min_tokens)
    found, others, dense, token = _score(config, task, subject, progress)
    result = Concepts(
        folder,
        concept_rows(task, found, others, dense, token),
        latent_rows(task, found),
        {
            **summary(task, found, others, dense, token),
            "settings": config.to_dict(),
            "checkpoint": str(subject.checkpoint),
            "checkpoint_sha256": sha256_file(subject.checkpoint) if subject.checkpoint.is_file() else None,
            "activations_sha256": rows.sha256 if rows is not None else None,
            "git_commit": get_git_commit(),
            "notes": [*subject.notes, *labelled.notes],
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
    path = _checkpoint(config)
    rows = _activations(config, None, path)
    assert rows is not None
    subject = open_subject(path, device=config.device)
    texts = stored_texts(rows, subject.model.tokenizer, config.max_texts)
    write_texts(config.texts_output, texts, overwrite=config.overwrite)
    return len(texts)


def _checkpoint(config: ConceptsConfig) -> Path:
    if config.run_dir is not None:
        Run(config.run_dir).checkpoint_path  # noqa: B018  says what to do about a run that is not finished
        return config.run_dir
    if config.checkpoint is None:
        raise MechintError("Provide --checkpoint or --run-dir")
    if not config.checkpoint.exists():
        raise MechintError(f"checkpoint not found: {config.checkpoint}; `ls runs/*/checkpoint.pt` shows what is there")
    return config.checkpoint


def _run_folder(path: Path) -> Path | None:
    """The run directory that a checkpoint is, or lies in."""
    for folder in (path, path.parent):
        if (folder / "config.json").is_file() and (folder / "checkpoint.pt").is_file():
            return folder
    return None


def _output_folder(config: ConceptsConfig, path: Path) -> Path:
    folder = config.output_dir or _run_folder(path) or (path if path.is_dir() else path.parent)
    if config.texts_output is not None:
        return folder
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
    if (folder := _run_folder(path)) is not None:
        return open_activations(Run(folder).activations_path())
    raise MechintError(f"{path} does not lie in a run directory: give the activations with --activations-path")


def _labelled(
    config: ConceptsConfig, file: SpanFile | None, rows: Activations | None, subject: Subject, progress: bool
) -> Labelled:
    if rows is None:
        assert file is not None
        return label_texts(subject, file, span_tokens=config.span_tokens, progress=progress)
    check_same_setting(subject.sae, rows, subject.checkpoint)
    tokenizer = subject.model.tokenizer
    if file is not None:
        return label_stored(rows, tokenizer, file, span_tokens=config.span_tokens)
    return label_tales(rows, tokenizer, span_tokens=config.span_tokens, max_texts=config.max_texts)


def _score(
    config: ConceptsConfig, task: Task, subject: Subject, progress: bool
) -> tuple[DictionaryScores, dict[str, DictionaryScores], Any, Any]:
    from tqdm import tqdm

    stages = ["tokens"] + ["sae"] + ["random", "pca"] * config.baselines + ["dense probe"] * config.probes
    with tqdm(total=len(stages), desc="concepts", unit="stage", disable=not progress, leave=False) as bar:
        token = token_f1(task)
        bar.update()
        device = subject.model.device
        ks = {} if config.probes else {"ks": ()}
        found = score_dictionary(
            task,
            lambda x: subject.sae.encode(x.to(device)),
            W_dec=subject.sae.W_dec,
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
