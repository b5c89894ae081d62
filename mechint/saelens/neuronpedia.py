"""Neuronpedia: its ids and addresses both ways, and features in the JSON that SAEDashboard writes for its import.

An id is `<model>/<layer>-<source>`, of a feature `<model>/<layer>-<source>/<index>`. The layer is a number or a letter
(`e`: the embedding), the source everything behind the first hyphen (`res-jb`, `gemmascope-res-16k`, `res_mid_32k-oai`).
What follows two underscores in a source is its suffix (`gemmascope-res-16k__l0-105`).

The export has the files that SAEDashboard 0.8.0 writes: `batch-<n>.json` (its NeuronpediaDashboardBatch),
`skipped_indexes.json` (latents that never fire) and `run_settings.json` (its NeuronpediaRunnerConfig).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechint.analysis import Latents, bin_edges, context_values, contexts, load_or_gather, logit_effects
from mechint.analysis.logits import output_weights
from mechint.data import Activations, open_activations
from mechint.errors import MechintError
from mechint.inside import Inside, in_residual, open_inside
from mechint.models import LanguageModel
from mechint.models.pieces import decoder, token_strings, token_texts
from mechint.provenance import make_dir, write_json
from mechint.runs import Run
from mechint.sae import SAE

LOGIT_BINS = 50
_HISTOGRAM = ("logits_hist_data_bar_heights", "logits_hist_data_bar_values")
SITE = "https://www.neuronpedia.org"
_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?neuronpedia\.org/", re.IGNORECASE)
_PART = r"[A-Za-z0-9._-]+"
_ID = re.compile(rf"(?P<model>{_PART})/(?P<layer>[0-9]+|[A-Za-z]+)-(?P<source>{_PART})(?:/(?P<index>[0-9]+))?")


@dataclass(frozen=True)
class NeuronpediaId:
    """The parts of an id; `index` is None for a whole SAE."""

    model: str
    layer: int | str
    source: str
    index: int | None = None

    def __str__(self) -> str:
        whole = f"{self.model}/{self.layer}-{self.source}"
        return whole if self.index is None else f"{whole}/{self.index}"


def parse_neuronpedia(text: str) -> NeuronpediaId:
    """The parts of an id or an address, of a page or of the API.

    Raises:
        MechintError: neither.
    """
    rest = _ADDRESS.sub("", text.strip(), count=1).split("?")[0].split("#")[0].strip("/").removeprefix("api/feature/")
    found = _ID.fullmatch(rest)
    if found is None:
        raise MechintError(
            f"{text!r} is no id or address of Neuronpedia; expected <model>/<layer>-<source>, such as"
            f" gpt2-small/8-res-jb, or {SITE}/gpt2-small/8-res-jb/1234"
        )
    layer, index = found["layer"], found["index"]
    return NeuronpediaId(
        found["model"], int(layer) if layer.isdigit() else layer, found["source"], None if index is None else int(index)
    )


def neuronpedia_id(sae: Any, index: int | None = None) -> str:
    """The id of an SAE (its record says it), or of one of its features.

    Raises:
        MechintError: the SAE's record names none, or there is no such feature.
    """
    metadata = sae.metadata if isinstance(sae, SAE) else sae.cfg.metadata
    d_sae = sae.d_sae if isinstance(sae, SAE) else sae.cfg.d_sae
    recorded = metadata.get("neuronpedia_id")
    if not recorded:
        raise MechintError("the SAE has no neuronpedia_id: it may not be there; set sae.cfg.metadata.neuronpedia_id")
    if index is not None and not 0 <= index < d_sae:
        raise MechintError(f"feature {index} is not among the {d_sae} of this SAE")
    parts = parse_neuronpedia(str(recorded))
    return str(NeuronpediaId(parts.model, parts.layer, parts.source, index))


def neuronpedia_url(sae: Any, index: int | None = None, *, api: bool = False) -> str:
    """The address of an SAE's page or of a feature's; with `api`, of the feature's JSON."""
    name = neuronpedia_id(sae, index)
    if api and index is None:
        raise MechintError("the API serves single features: give index")
    return f"{SITE}/api/feature/{name}" if api else f"{SITE}/{name}"


def neuronpedia_features(
    run_dir: str | Path,
    output: str | Path,
    *,
    sae_id: str,
    latents: Sequence[int] | None = None,
    window: int = 32,
    n_logits: int = 10,
    batch: int = 128,
    progress: bool = False,
) -> list[Path]:
    """Write the features of a run as `batch-0.json`, `batch-1.json`, ... into the folder `output`; returns those files.
    Beside them: `skipped_indexes.json` and `run_settings.json`.

    Per feature: its strongest contexts and samples of the strata below, with the value on every token; the tokens that
    it raises and lowers most; histograms of its values and of its effects on the logits; how often it fires; those that
    fire together with it. All from the activations of the run, over all of their rows.

    Args:
        sae_id: the Neuronpedia id of the SAE, `<model>/<layer>-<source>`.
        latents: which; all that fire if not given.
        window: tokens shown on each side.
        n_logits: tokens raised and lowered.
        batch: features a file.

    Raises:
        MechintError: an unfinished run, activations that are missing or were stored without tokens, a folder that holds
            such files already.
    """
    folder = Path(output)
    if any(folder.glob("batch-*.json")):
        raise MechintError(f"{folder} holds batch-*.json already and is not overwritten: give another folder")
    name = parse_neuronpedia(sae_id)
    run = Run(run_dir)
    activations = open_activations(run.activations_path())
    inside = open_inside(run.path, device="cpu")
    gathered = load_or_gather(run, sae=inside.sae, activations=activations, progress=progress)
    chosen = [int(latent) for latent in (latents if latents is not None else gathered.counts.nonzero().flatten())]
    for latent in chosen:
        gathered.check_latent(latent)
    make_dir(folder)
    texts = _texts(activations)
    sae_set, _, suffix = name.source.partition("__")
    settings = {
        "sae_set": sae_set,
        "sae_path": Path(run.path).name,
        "outputs_dir": folder.name,
        "np_sae_id_suffix": suffix or None,
        "from_local_sae": True,
        "huggingface_dataset_path": texts["dataset"],
        "n_prompts_total": texts["n_prompts_total"],
        "n_tokens_in_prompt": texts["n_tokens_in_prompt"],
        "n_features_at_a_time": batch,
        "n_quantiles": gathered.settings.n_strata,
        "top_acts_group_size": gathered.settings.k,
        "quantile_group_size": gathered.settings.n_examples,
        "model_id": name.model,
        "layer": name.layer,
    }
    skipped = {
        "model_id": name.model,
        "layer": str(name.layer),
        "sae_set": sae_set,
        # less often than once in these rows
        "log_sparsity": round(-math.log10(max(gathered.n_rows, 1)), 3),
        "skipped_indexes": gathered.dead().tolist(),
    }
    write_json(folder / "run_settings.json", settings)
    write_json(folder / "skipped_indexes.json", skipped)
    written = []
    for number, start in enumerate(range(0, len(chosen), batch)):
        part = chosen[start : start + batch]
        page = {
            "model_id": name.model,
            "layer": name.layer,
            "sae_set": sae_set,
            "sae_id_suffix": suffix or None,
            "features": [
                {**feature, **texts} for feature in _features(inside, activations, gathered, part, window, n_logits)
            ],
        }
        path = folder / f"batch-{number}.json"
        write_json(path, page)
        written.append(path)
    return written


def _texts(activations: Activations) -> dict[str, Any]:
    """What the texts were, as each feature says it."""
    info, ids = activations.info, activations.text_ids
    longest = int(activations.positions.max()) + 1 if activations.positions is not None else 0
    n_texts = info.get("n_texts") or (0 if ids is None else int(ids.max()) + 1)
    return {
        "n_prompts_total": int(n_texts),
        "n_tokens_in_prompt": int(info.get("context_size") or longest),
        "dataset": str(info.get("dataset_name") or ""),
    }


def _features(
    inside: Inside,
    activations: Activations,
    gathered: Latents,
    latents: list[int],
    window: int,
    n_logits: int,
) -> list[dict[str, Any]]:
    sae, model = inside.sae, inside.model
    on_output = _on_output(inside, latents, n_logits)
    edges = bin_edges()
    middles = [float(math.sqrt(low * high)) for low, high in zip(edges[:-1], edges[1:], strict=True)]
    found = []
    for place, latent in enumerate(latents):
        heights = gathered.histogram[latent]
        filled = heights.nonzero().flatten().tolist()
        direction = sae.W_dec[latent].detach().float()
        strongest = direction.abs().topk(min(3, sae.d_out))
        found.append(
            {
                "feature_index": latent,
                "neuron_alignment_indices": strongest.indices.tolist(),
                "neuron_alignment_values": _rounded(direction[strongest.indices]),
                "neuron_alignment_l1": _rounded(strongest.values / direction.abs().sum()),
                **_partners(gathered, latent),
                "correlated_neurons_indices": [],
                "correlated_neurons_pearson": [],
                "correlated_neurons_l1": [],
                **on_output[place],
                "frac_nonzero": float(gathered.density[latent]),
                "freq_hist_data_bar_heights": [int(heights[bin]) for bin in filled],
                "freq_hist_data_bar_values": [middles[bin] for bin in filled],
                "decoder_weights_dist": [],
                "vector": [],
                "activations": _activations(sae, model, activations, gathered, latent, window),
            }
        )
    return found


def _on_output(inside: Inside, latents: list[int], n_logits: int) -> list[dict[str, Any]]:
    """What each latent does to the tokens by itself; nothing where it adds to no residual stream."""
    names = ("pos_str", "pos_values", "neg_str", "neg_values", *_HISTOGRAM)
    if not in_residual(inside.hook_out):
        return [{name: [] for name in names} for _ in latents]
    sae, model = inside.sae, inside.model
    effects = logit_effects(sae, model, k=n_logits, latents=torch.tensor(latents, dtype=torch.int64))
    weight, gain, centred = output_weights(model)
    found = []
    for place, latent in enumerate(latents):
        direction = sae.W_dec[latent].detach().float()
        found.append(
            {
                "pos_str": token_texts(decoder(model.tokenizer), effects.promoted[place].tolist()),
                "pos_values": _rounded(effects.promoted_effect[place]),
                "neg_str": token_texts(decoder(model.tokenizer), effects.suppressed[place].tolist()),
                "neg_values": _rounded(effects.suppressed_effect[place]),
                **_logit_histogram(weight @ ((direction - direction.mean() if centred else direction) * gain)),
            }
        )
    return found


def _activations(
    sae: SAE, model: LanguageModel, activations: Activations, gathered: Latents, latent: int, window: int
) -> list[dict[str, Any]]:
    """The strongest rows (a bin from -1 to the largest value says so), then those of each stratum from the highest
    down. `bin_contains` is the share of all rows that a stratum stands for."""
    edges = gathered.stratum_edges[latent]
    n_strata = gathered.settings.n_strata
    largest, share = round(float(gathered.max[latent]), 3), float(gathered.density[latent]) / n_strata
    groups: list[tuple[Tensor, float, float, float]] = [(gathered.top_rows[latent], -1.0, largest, -1.0)]
    for stratum in range(n_strata - 1, -1, -1):
        rows = gathered.stratum_rows[latent, stratum]
        groups.append((rows, float(edges[stratum]), float(edges[stratum + 1]), share))
    found = []
    for rows, low, high, share in groups:
        for context in contexts(activations, rows, window):
            found.append(
                {
                    "bin_min": low,
                    "bin_max": high,
                    "bin_contains": share,
                    "qualifying_token_index": context.center,
                    "tokens": token_strings(decoder(model.tokenizer), context.tokens),
                    "values": _rounded(context_values(sae, activations, context, latent)),
                }
            )
    return found


def _logit_histogram(effects: Tensor) -> dict[str, Any]:
    """How a feature's effects on the logits are distributed over the vocabulary, their mean taken off."""
    effects = effects - effects.mean()
    counts, edges = torch.histogram(effects.float().cpu(), bins=LOGIT_BINS)
    return dict(
        zip(_HISTOGRAM, ([int(count) for count in counts], _rounded((edges[:-1] + edges[1:]) / 2)), strict=True)
    )


def _partners(gathered: Latents, latent: int) -> dict[str, Any]:
    """Latents that fire together with it: the correlation of the two firing, highest first, and under `l1`, where
    SAEDashboard has it, their cosine."""
    partners, density = gathered.partners, gathered.density.double()
    there = (partners.latent[latent] >= 0).nonzero().flatten()
    there = there[partners.phi[latent][there].argsort(descending=True)]
    others = partners.latent[latent][there]
    both = partners.both[latent][there].double() / max(partners.n_rows, 1)
    cosine = (both / (density[latent] * density[others]).sqrt().clamp_min(1e-12)).clamp_max(1.0)
    return {
        "correlated_features_indices": others.tolist(),
        "correlated_features_pearson": _rounded(partners.phi[latent][there]),
        "correlated_features_l1": _rounded(cosine),
    }


def _rounded(values: Tensor) -> list[float]:
    """Three digits behind the point, as dashboards show."""
    return [round(float(value), 3) for value in values]
