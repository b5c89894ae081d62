"""The features of an SAE of the library: what its run's analysis found, and what its own weights tell.

Nothing is computed over activations here and nothing is downloaded: `latents.safetensors` of the run (docs/analysis.md)
holds the figures, the stored activations the texts, and a model that lies on this machine spells the tokens and gives
the effects on the output. What is missing is left out, and `notes` says what would bring it.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mechint.analysis import (
    Latents,
    bin_edges,
    context_values,
    contexts,
    load_latents,
    logit_effects,
    token_strings,
    token_texts,
)
from mechint.data.store import Activations, open_activations
from mechint.errors import MechintError, one_line
from mechint.formats.convert import load as load_any
from mechint.formats.folds import not_plain, plain_form
from mechint.report.facts import latent_concepts
from mechint.report.latents import NONE, labels
from mechint.runs import Run
from mechint.sae import SAE
from mechint.server.errors import ServiceError
from mechint.server.language import decode_of, open_language, without
from mechint.server.models import SharedSAE
from mechint.server.settings import Settings
from mechint.server.storage import sae_folder

KEPT_OPEN = 3
N_CONTEXTS, WINDOW, N_EFFECTS, N_NEAREST = 10, 12, 10, 8
NEURONPEDIA = "https://www.neuronpedia.org"


class Analysis(NamedTuple):
    """Everything that is known of one SAE's features, opened once."""

    sae_id: str
    layer: int | None
    sae: SAE
    plain: SAE | None  # in its plain form, where weights alone say what it computes
    latents: Latents | None
    activations: Activations | None
    model: Any  # LanguageModel, or None
    decode: Callable[[list[int]], str]
    density: np.ndarray | None
    top_tokens: list[list[str]]
    concepts: dict[int, tuple[str, float]]
    neuronpedia: str | None
    notes: tuple[str, ...]

    @property
    def n_features(self) -> int:
        return self.sae.d_sae

    @property
    def analysed(self) -> bool:
        return self.latents is not None or self.density is not None

    def label(self, feature: int) -> str | None:
        """The concept that it matches best, else the token that it fires on most often; None where neither is known."""
        if feature in self.concepts:
            return self.concepts[feature][0]
        tokens = self.top_tokens[feature] if self.top_tokens else []
        return (tokens[0].strip() or repr(tokens[0])) if tokens else None


class Analyses:
    """The analyses that a server process has open, the longest unused one given up first."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._open: OrderedDict[tuple[Any, ...], Analysis] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, row: SharedSAE) -> Analysis:
        """Raises `ServiceError` where the SAE's files cannot be read."""
        run = run_folder(self.settings, row)
        changed = [_modified(path) for path in ((run / "latents.json", run / "latent_concepts.csv") if run else ())]
        key = (row.id, row.downloaded_at, row.layer, *changed)
        # one at a time: two requests for one SAE read its files once, and the memory for two is never needed
        with self._lock:
            if key not in self._open:
                self._open[key] = open_analysis(self.settings, row, run)
                while len(self._open) > KEPT_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(key)
            return self._open[key]


def _modified(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def library_folder(settings: Settings, row: SharedSAE) -> Path:
    """The folder of an SAE's converted files. Raises `ServiceError` where they are not there."""
    folder = sae_folder(settings, row.id) / "sae"
    if not folder.is_dir() or folder.is_symlink():
        raise ServiceError(
            "files_missing", f"The files of {row.id} are not there", "download or import it again", status=409
        )
    return folder


def load_library(settings: Settings, row: SharedSAE) -> SAE:
    """The weights of an SAE of the library, in whatever form it was filed."""
    folder = library_folder(settings, row)
    try:
        return load_any(folder, from_format="mechint" if (folder / "checkpoint.pt").is_file() else None)[1]
    except MechintError as error:
        told = one_line(error).replace(str(settings.data_dir), "")
        raise ServiceError("files_broken", f"The files of {row.id} cannot be read: {told}", status=409) from None


def run_folder(settings: Settings, row: SharedSAE) -> Path | None:
    """The run directory that an SAE was imported from, if it is (still) below the runs folder."""
    root = settings.runs_root
    said = (row.sae_metadata or {}).get("run") or row.training_id
    if not said or not isinstance(said, str):
        return None
    try:
        folder = (root / said).resolve()
        if not folder.is_relative_to(root.resolve()) or folder == root.resolve():
            return None
        return folder if (folder / "config.json").is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None


def open_analysis(settings: Settings, row: SharedSAE, run: Path | None) -> Analysis:
    """Read what there is of an SAE; see the module."""
    sae = load_library(settings, row)
    notes: list[str] = []
    plain = plain_form(sae) if not_plain(sae) is None else None
    latents = _latents(run, sae, notes)
    activations = _activations(run, latents, notes)
    language = open_language(sae.metadata, row, run, notes)
    decode = decode_of(language.tokenizer)
    density = latents.density.numpy() if latents is not None else _recorded_density(sae_folder(settings, row.id), sae)
    top: list[list[str]] = []
    if latents is not None and activations is not None and activations.tokens is not None:
        ids = labels(latents, activations.tokens.numpy())
        top = [token_texts(decode, [int(i) for i in line if i != NONE]) for line in ids]
    concepts: dict[int, tuple[str, float]] = {}
    if run is not None and latents is not None:
        try:
            concepts = latent_concepts(Run(run))
        except MechintError as error:
            notes.append(f"concepts are not shown: {without(error, run)}")
    recorded = sae.metadata.get("neuronpedia_id") or (row.sae_metadata or {}).get("neuronpedia_id")
    return Analysis(
        row.id,
        row.layer,
        sae,
        plain,
        latents,
        activations,
        language.model,
        decode,
        density,
        top,
        concepts,
        str(recorded) if recorded else None,
        tuple(notes),
    )


def _latents(run: Path | None, sae: SAE, notes: list[str]) -> Latents | None:
    if run is None:
        notes.append("It was not imported from a training run of this server, so there are no figures of its features.")
        return None
    if not (run / "latents.json").is_file():
        notes.append(f"Figures of its features appear once `mechint report {run.name}` was run on its run directory.")
        return None
    try:
        latents, _ = load_latents(run)
    except MechintError as error:
        notes.append(f"The figures of its features cannot be read: {without(error, run)}")
        return None
    if latents.d_sae != sae.d_sae:
        notes.append(f"The run has {latents.d_sae} latents now, this SAE {sae.d_sae}: its figures are not shown.")
        return None
    return latents


def _activations(run: Path | None, latents: Latents | None, notes: list[str]) -> Activations | None:
    if run is None or latents is None:
        return None
    try:
        found = open_activations(Run(run).activations_path())
    except MechintError as error:
        notes.append(f"Texts are not shown: {without(error, run)}")
        return None
    if int(latents.top_rows.max()) >= found.n_rows:
        notes.append("Texts are not shown: the activations are not those that the figures were made from.")
        return None
    if found.tokens is None:
        notes.append("Texts are not shown: the activations were stored without their tokens.")
    return found


def _recorded_density(folder: Path, sae: SAE) -> np.ndarray | None:
    """Firing frequency from sparsity.safetensors (its logarithm to base 10), which community SAEs bring along."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for path in sorted((folder / "original").rglob("sparsity.safetensors")):
        try:
            found = load_file(path).get("sparsity")
        except (SafetensorError, OSError):
            return None
        if found is not None and found.shape == (sae.d_sae,):
            return torch.pow(10.0, found.double()).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1).numpy()
    return None


# --- what the routes answer -------------------------------------------------------------------------------------------


def summary(found: Analysis, feature: int) -> dict[str, Any]:
    """One line of the list of features."""
    latents = found.latents
    count, mean, highest = None, None, None
    if latents is not None:
        count = int(latents.counts[feature])
        mean, highest = _finite(latents.mean[feature]), _finite(latents.max[feature])
    page = f"{NEURONPEDIA}/{found.neuronpedia}/{feature}" if found.neuronpedia else None
    return {
        "feature_idx": feature,
        "layer": found.layer,
        "label": found.label(feature),
        "activation_count": count,
        "mean_activation": mean,
        "max_activation": highest,
        "top_tokens": found.top_tokens[feature] if found.top_tokens else [],
        "neuronpedia_url": page,
        "feature_id": f"{found.sae_id}:{feature}",
        "density": _finite(found.density[feature]) if found.density is not None else None,
    }


def search(found: Analysis, query: str | None, sort_by: str, descending: bool) -> list[int]:
    """The features that a query names, in order.

    A number is a feature's own; other text is looked for in labels and top tokens, whatever its case.
    """
    query = (query or "").strip()
    if query.isascii() and query.isdigit() and len(query) < 10:
        return [int(query)] if int(query) < found.n_features else []
    listed = range(found.n_features)
    if query:
        wanted = query.casefold()
        listed = [i for i in listed if any(wanted in word.casefold() for word in _words(found, i))]
    by = _sort_values(found, sort_by)
    if by is None:
        return list(listed)[::-1] if descending else list(listed)
    return sorted(listed, key=lambda i: (-by[i] if descending else by[i], i))


def _words(found: Analysis, feature: int) -> list[str]:
    return [found.label(feature) or "", *(found.top_tokens[feature] if found.top_tokens else [])]


def _sort_values(found: Analysis, sort_by: str) -> np.ndarray | None:
    if sort_by == "density":
        return None if found.density is None else np.nan_to_num(found.density)
    if found.latents is None or sort_by == "feature_idx":
        return None
    return {"max_activation": found.latents.max, "mean_activation": found.latents.mean}[sort_by].numpy()


def detail(found: Analysis, feature: int) -> dict[str, Any]:
    """Everything about one feature. Raises `ServiceError` if there is none of that number."""
    if not 0 <= feature < found.n_features:
        raise ServiceError(
            "feature_not_found",
            f"Feature not found: {feature} in {found.sae_id}",
            f"its features are 0 to {found.n_features - 1}",
            status=404,
        )
    notes = list(found.notes)
    promoted, suppressed = _effects(found, feature, notes)
    rows = found.sae.weights()["W_dec"]
    histogram, edges = _histogram(found.latents, feature)
    return summary(found, feature) | {
        "contexts": _contexts(found, feature),
        "promoted": promoted,
        "suppressed": suppressed,
        "histogram": histogram,
        "histogram_edges": edges,
        "decoder_norm": _finite(rows[feature].norm()) or 0.0,
        "nearest": _nearest(rows, feature),
        "notes": notes,
    }


def _contexts(found: Analysis, feature: int) -> list[dict[str, Any]]:
    latents, activations, weights = found.latents, found.activations, found.plain
    if latents is None or activations is None or activations.tokens is None or weights is None:
        return []
    rows, values = latents.top_rows[feature, :N_CONTEXTS], latents.top_values[feature, :N_CONTEXTS]
    kept = (rows >= 0) & (values > 0)
    shown = []
    for context, value in zip(contexts(activations, rows[kept], WINDOW), values[kept].tolist(), strict=True):
        acts = context_values(weights, activations, context, feature).tolist()
        shown.append(
            {
                "tokens": token_strings(found.decode, context.tokens),
                "values": [_finite(act) or 0.0 for act in acts],
                "center": context.center,
                "activation": value,
                "text_id": context.text_id,
                "position": context.position,
            }
        )
    return shown


def _effects(found: Analysis, feature: int, notes: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if found.model is None or found.plain is None:
        return [], []
    try:
        effects = logit_effects(found.plain, found.model, k=N_EFFECTS, latents=torch.tensor([feature]))
    except MechintError as error:
        notes.append(f"Output tokens are not shown: {one_line(error)}")
        return [], []

    def named(tokens: Tensor, values: Tensor) -> list[dict[str, Any]]:
        spelled = token_texts(found.decode, tokens.tolist())
        return [{"token": t, "effect": _finite(v) or 0.0} for t, v in zip(spelled, values.tolist(), strict=True)]

    return (
        named(effects.promoted[0], effects.promoted_effect[0]),
        named(effects.suppressed[0], effects.suppressed_effect[0]),
    )


def _histogram(latents: Latents | None, feature: int) -> tuple[list[int], list[float]]:
    """Rows by activation, without the empty bins at both ends."""
    if latents is None:
        return [], []
    counts = latents.histogram[feature].numpy()
    used = np.flatnonzero(counts)
    if not len(used):
        return [], []
    first, last = int(used[0]), int(used[-1])
    return counts[first : last + 1].tolist(), [float(edge) for edge in bin_edges()[first : last + 2]]


def _nearest(rows: Tensor, feature: int) -> list[dict[str, Any]]:
    """Features whose decoder rows point most nearly the same way."""
    norms = rows.norm(dim=1).clamp_min(1e-30)
    cosines = (rows @ (rows[feature] / norms[feature])) / norms
    cosines[feature] = -torch.inf
    best = cosines.topk(min(N_NEAREST, len(rows) - 1))
    return [
        {"feature_idx": i, "cosine": round(max(-1.0, min(1.0, cosine)), 6)}
        for i, cosine in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        if np.isfinite(cosine)
    ]


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None
