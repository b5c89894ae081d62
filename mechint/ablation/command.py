"""`ablate`: from a checkpoint and a file of texts to the ranking, as the command line asks for it."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechint.ablation.rank import feature_indices, rank_on_contexts, save_ablation_rows
from mechint.config import AblateConfig
from mechint.data.contexts import Context
from mechint.data.documents import Document
from mechint.data.text import documents_from
from mechint.errors import MechintError
from mechint.eval.given import given_contexts
from mechint.inside import Inside, named_sae, open_named
from mechint.provenance import check_output_path, sha256_json


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
    config = named_sae(config)
    if config.output.exists() and not config.overwrite:
        raise MechintError(f"{config.output} exists: give another --output, or --overwrite to replace it")
    check_output_path(config.output)
    if config.batch_size < 1:
        raise MechintError(f"--batch-size must be at least 1, got {config.batch_size}")
    if config.context_size is not None and config.context_size < 2:
        raise MechintError(f"--context-size must be at least 2, got {config.context_size}")
    documents = documents_from(config.eval_texts_path, config.text_field, config.unit)
    inside = open_named(
        config,
        prepend_bos=config.prepend_bos,
        context_size=config.context_size,
        check=lambda sae: feature_indices(config.feature_subset, sae.d_sae),
    )
    features = feature_indices(config.feature_subset, inside.sae.d_sae)
    contexts, told = given_contexts(inside, documents)
    notes = (*inside.notes, *told)
    for note in notes:
        on_note(note)
    names = _names(inside, documents, contexts)
    token_lists = [context.tokens for context in contexts]
    rows = rank_on_contexts(
        inside.sae,
        inside.model,
        inside.hook_name,
        names,
        token_lists,
        features,
        prepend_bos=inside.prepend_bos,
        batch_size=config.batch_size,
        progress=progress,
        partial_path=partial_path(config.output),
        fingerprint=fingerprint_of(inside, texts=token_lists, features=features, layout=3),
    )
    save_ablation_rows(rows, config.output, overwrite=config.overwrite)
    partial_path(config.output).unlink(missing_ok=True)
    return Ablation(rows, config.output, notes)


def _names(inside: Inside, documents: Sequence[Document], contexts: Sequence[Context]) -> list[str]:
    """What each context is called in the result: its text, or of a text that it holds a part of, that part."""
    n_windows = Counter(context.text_ids[0] for context in contexts)
    names = []
    for context in contexts:
        content = documents[context.text_ids[0]].content
        if isinstance(content, str) and n_windows[context.text_ids[0]] == 1:
            names.append(content)
        else:
            names.append(inside.model.tokenizer.decode(context.tokens[int(inside.prepend_bos) :]))
    return names


def fingerprint_of(inside: Inside, **what: Any) -> str:
    """Changes with anything that changes the sums of a partial result: SAE, model, hook, BOS, and `what`."""
    weights = hashlib.sha256()
    for name, tensor in sorted(inside.sae.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha256_json(
        {
            "sae": weights.hexdigest(),
            "model": inside.model.weights_sha256(),
            "processing": inside.model.processing,
            **({} if inside.hook_out == inside.hook_name else {"hook_out": inside.hook_out}),
            "hook_name": inside.hook_name,
            "prepend_bos": inside.prepend_bos,
            **what,
        }
    )
