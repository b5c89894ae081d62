"""The cards of SAE bundles: of our run directories, and of the first platform's numbered runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechint.config import DATASET_ALIASES
from mechint.data.text_files import format_of
from mechint.hub.bundle import StagedFile
from mechint.hub.card import Card, Section, code, is_hub_id, measures_of, render_card
from mechint.models.resolve import ALIASES, BUILTIN_MODELS
from mechint.report.facts import number
from mechint.sae.base import SAE

KIND_TAG = "sparse-autoencoder"
# key, unit, what it is: in the order of the card's table. docs/metrics.md has the formulas.
RUN_MEASURES = (
    ("l0", "latents a token", "latents active on a token, mean"),
    ("fvu", "fraction", "variance of the activations that the reconstruction misses"),
    ("explained_variance", "fraction", "1 - fvu"),
    ("mse_per_dim", "squared activation", "squared error, mean over tokens and dimensions"),
    ("cosine", "cosine", "of activation and reconstruction, mean"),
    ("l2_ratio", "ratio", "norm of the reconstruction over that of the activation, mean"),
    ("ce_recovered_mean", "fraction", "cross-entropy recovered, against replacing the activation by its mean"),
    ("ce_recovered_zero", "fraction", "cross-entropy recovered, against replacing the activation by zero"),
    ("ce_clean", "nats a token", "cross-entropy of the model as it is"),
    ("ce_sae", "nats a token", "cross-entropy with the reconstruction in the activation's place"),
    ("kl_clean_sae", "nats a token", "KL of the predictions with the reconstruction from those without"),
    ("dead_features", "latents", "latents that are active on no training token"),
    ("dense_features", "latents", "latents that are active on more than a tenth of the training tokens"),
)
ARTIFACT_MEASURES = (
    ("mean_features_per_token", "latents a token", "latents active on a token, mean"),
    ("reconstruction_mse", "squared activation", "squared error, mean over tokens and dimensions"),
    ("explained_variance", "fraction", "1 - squared error over the variance of all entries"),
    ("dead_features", "latents", "latents that are active on no token"),
    ("dead_feature_ratio", "fraction", "share of such latents"),
    ("live_features", "latents", "latents that are active on some token"),
    ("initial_loss", "squared activation", "loss at the start of the training"),
    ("final_loss", "squared activation", "loss at its end"),
)
# What eval.json calls the rows it measured.
ROWS = {
    "heldout by text": "held-out texts",
    "heldout by row": "held-out tokens, of texts that were trained on too",
    "all": "all tokens",
}
CAPTIONS = {
    "training": "Training curves",
    "density": "How often latents are active",
    "l0": "Active latents a token",
    "decoder": "Cosine of each decoder direction with its nearest",
    "effects": "Effect of removing each latent on the model's predictions",
    "attribution": "Fast estimate of a latent's effect against the exact one",
    "concepts": "Known concepts and the latents that match them best",
    "map": "Decoder directions in two dimensions",
}
UNRECORDED = "activations without a record"
# What TransformerLens and people call models that the Hub has under another id.
_GPT2 = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


def base_model_id(name: str | None) -> str | None:
    """The Hub's id of a model that goes by `name`; None for built-in models and folders."""
    if name is None or name in BUILTIN_MODELS:
        return None
    return {**ALIASES, **_GPT2}.get(name, name if "/" in name else None)


def trained_on(facts: Mapping[str, Any], source: Mapping[str, Any]) -> tuple[str | None, str, bool]:
    """`(base model's id or None, data set, whether that is one of the Hub)` of a run.

    `source` is what its manifest says of the activations: a model or a data set of the Hub has a revision there, files
    of this machine have none. Where the activations have no record at all, what the settings say of them is only a
    default. Manifests of the first pipeline say nothing and are taken by the form of the name.
    """
    model, dataset = str(facts["model"]), DATASET_ALIASES.get(str(facts["dataset"]), str(facts["dataset"]))
    if not is_recorded(source):
        return None, UNRECORDED, False
    base = base_model_id(model)
    if model not in ALIASES and source.get("model_revision", model) is None:
        base = None
    on_hub = "/" in dataset and is_hub_id(dataset) and format_of(Path(dataset)) is None
    return base, dataset, on_hub and source.get("dataset_revision", dataset) is not None


def is_recorded(source: Mapping[str, Any]) -> bool:
    """Whether the activations say which model they are of; manifests that do not speak of it are believed."""
    said = [source[key] for key in ("model_sha256", "model_source") if key in source]
    return not said or any(value is not None for value in said)


def load_snippet(repo_id: str, site: str, *, saelens: bool) -> str:
    """Two lines that load, and some that use."""
    if saelens:
        lines = ["from mechint import SAE", "", f'sae = SAE.from_pretrained("{repo_id}")']
    else:
        lines = [
            "from mechint.hub import load_pretrained_sae",
            "",
            f'sae, config = load_pretrained_sae("{repo_id}")',
        ]
    lines = ["import torch", "", *lines, f"x = torch.randn(4, sae.cfg.d_in)  # in place of {site}"]
    lines += ["feature_acts = sae.encode(x)  # [4, d_sae]", "reconstruction = sae.decode(feature_acts)  # [4, d_in]"]
    return "\n".join([*lines, "print(feature_acts.shape, reconstruction.shape)"])


def other_ways(repo_id: str) -> str:
    """Markdown: the same with its settings beside it, and SAELens's way."""
    return f"""With what is known of it, and files held to their hashes:

```python
from mechint.hub import load_pretrained_sae

sae, config = load_pretrained_sae("{repo_id}")
print(config["model_name"], config["hook_site"], config["n_features"])
```

The files are in SAELens's layout (6 and later). There, download the repository with
`huggingface_hub.snapshot_download("{repo_id}")` and pass its folder to `sae_lens.SAE.load_from_disk`."""


def run_card(
    name: str,
    repo_id: str,
    staged: Mapping[str, StagedFile],
    sae: SAE,
    facts: Mapping[str, Any],
    manifest: Mapping[str, Any],
    license: str,
) -> str:
    """README.md of a run directory's bundle; `facts` are those of `mechint.report.facts.run_facts`."""
    model, hook = str(facts["model"]), str(facts["hook"])
    source = _mapping(_mapping(manifest.get("inputs")).get("activations"))
    base, dataset, on_hub = trained_on(facts, source)
    lead = (
        f"A {sae.architecture} sparse autoencoder with {sae.d_sae:,} latents on {hook} of {model}"
        f" ({sae.d_in} dimensions), trained on {dataset}."
    )
    rows = [
        ("Model", model if is_recorded(source) else f"{model}, by the settings; the activations do not say"),
        ("Hook", hook),
        ("Architecture", sae.architecture + (f", k = {sae.cfg.k}" if sae.cfg.k is not None else "")),
        ("d_in", str(sae.d_in)),
        ("d_sae", f"{sae.d_sae:,}"),
        ("Activations", _activations_in_words(sae.metadata)),
        ("Sparsity", str(facts["sparsity"])),
        ("Trained on", f"{dataset}, {facts['steps']:,} steps of {facts['batch_size']:,} vectors"),
    ]
    usage = other_ways(repo_id)
    if (model in BUILTIN_MODELS or base is not None) and is_recorded(source):
        usage = f"In the model:\n\n```python\n{_in_model(repo_id, model, hook)}\n```\n\n{usage}"
    sections = []
    if settings := facts["settings"]:
        changed = ", ".join(code(f"{line['name']} = {line['value']}") for line in settings)
        sections.append(
            Section("Training", f"Settings that differ from the defaults: {changed}.\n\n`config.json` has all.")
        )
    if "report.html" in staged:
        sections.append(
            Section("Report", "`report.html` is a page about this SAE and each of its latents: download it, open it.")
        )
    outputs = _mapping(manifest.get("outputs"))
    if any(name in staged and staged[name].sha256 != recorded for name, recorded in outputs.items()):
        text = (
            "Folders of the machine that made the files were taken out of them, so some hashes below are not those of"
            " `manifest.json`; `bundle_metadata.json` marks these files as `scrubbed`."
        )
        sections.append(Section("Hashes", text))
    quality = dict(facts["quality"])
    rows_of = ROWS.get(str(quality.get("rows")), "held-out tokens")
    return render_card(
        Card(
            title=name,
            lead=lead,
            kind_tag=KIND_TAG,
            tags=("saelens", model.split("/")[-1], sae.architecture),
            license=license,
            base_model=base,
            datasets=(dataset,) if on_hub else (),
            facts=tuple(rows),
            measures=measures_of(quality, RUN_MEASURES),
            measured_on=(dataset, rows_of),
            usage=load_snippet(repo_id, f"activations at {hook}", saelens=True),
            after_usage=usage,
            sections=tuple(sections),
            figures=tuple((f"figures/{figure}.png", caption) for figure, caption in CAPTIONS.items()),
            provenance=tuple((label, value) for label, value in facts["provenance"]),
        ),
        staged,
    )


def _activations_in_words(metadata: Mapping[str, Any]) -> str:
    words = {"raw": "as the model computes them", "centred": "minus their mean over dimensions"}
    found, bos = words.get(str(metadata.get("processing")), "processing not recorded"), metadata.get("prepend_bos")
    found += "" if bos is None else ", BOS prepended" if bos else ", no BOS"
    return f"not recorded; taken as the first pipeline's: {found}" if metadata.get("legacy") else found


def _in_model(repo_id: str, model: str, hook: str) -> str:
    return f"""from mechint import SAE, HookedSAETransformer

sae = SAE.from_pretrained("{repo_id}")
model = HookedSAETransformer.from_pretrained("{model}")
_, cache = model.run_with_cache_with_saes("Anna was a baker who lived in Oslo.", saes=[sae])
feature_acts = cache["{hook}.hook_sae_acts_post"]  # [1, tokens, d_sae]
print(feature_acts.shape)"""


def artifact_card(
    name: str,
    repo_id: str,
    staged: Mapping[str, StagedFile],
    sae: SAE,
    records: Mapping[str, Any],
    run_id: int | None,
    model: str | None,
    license: str,
) -> str:
    """README.md of a numbered run's bundle. `records`: spec, result, environment, manifest, sae_config, those that are
    there."""
    spec, result = _mapping(records.get("spec")), _mapping(records.get("result"))
    environment, parameters = _mapping(records.get("environment")), _mapping(spec.get("parameters"))
    hook = parameters.get("hook_site") or sae.metadata.get("hook_name")
    where = f"{hook} of {model}" if hook and model else str(model or "an unnamed model")
    k = sae.cfg.k
    lead = str(spec.get("description") or "").strip() or (
        f"A {sae.architecture} sparse autoencoder with {sae.d_sae:,} latents on {where} ({sae.d_in} dimensions)."
    )
    metrics = _mapping(result.get("metrics"))
    n_tokens = number(metrics.get("n_tokens"))
    rows = [
        ("Run", run_id),
        ("Model", model),
        ("Hook", hook),
        ("n_features", f"{sae.d_sae:,}"),
        ("input_dim", sae.d_in),
        ("k", k),
        ("Tokens", f"{n_tokens:,.0f}" if n_tokens is not None else None),
    ]
    measures = measures_of(metrics, ARTIFACT_MEASURES)
    dataset = parameters.get("dataset") or parameters.get("corpus")
    measured_on = (str(dataset or spec.get("name") or name), "tokens")
    versions = _mapping(environment.get("package_versions"))
    provenance = [
        ("run", f"run-{run_id:06d}" if run_id is not None else None),
        ("specification", spec.get("name")),
        ("family", spec.get("family") or environment.get("family")),
        ("backend", spec.get("backend") or environment.get("backend")),
        ("status", result.get("status")),
        ("seed", environment.get("seed")),
        ("Python", environment.get("python_version")),
        ("versions", ", ".join(f"{package} {version}" for package, version in sorted(versions.items()))),
        ("uv.lock, SHA-256", environment.get("uv_lock_sha256")),
    ]
    saelens = "cfg.json" in staged
    architecture = (
        "The latents of a token are the k largest entries of `encoder.weight @ x + encoder.bias`; negative ones among"
        " them stay. The reconstruction is `decoder.weight @ latents + decoder.bias`."
    )
    return render_card(
        Card(
            title=name,
            lead=lead,
            kind_tag=KIND_TAG,
            tags=tuple(filter(None, ("saelens" if saelens else "", str(model or "").split("/")[-1]))),
            license=license,
            base_model=base_model_id(model),
            datasets=(str(dataset),) if dataset and "/" in str(dataset) else (),
            facts=tuple((label, str(value)) for label, value in rows if value is not None),
            measures=measures,
            measured_on=measured_on if measures else None,
            usage=load_snippet(repo_id, f"activations at {hook}" if hook else "activations", saelens=saelens),
            after_usage=other_ways(repo_id) if saelens else "",
            sections=() if saelens else (Section("What it computes", architecture),),
            provenance=tuple((label, str(value)) for label, value in provenance if value not in (None, "")),
        ),
        staged,
    )


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
