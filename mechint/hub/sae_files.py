"""The files beside an SAE's weights that a run directory does not hold in that form: made from its records.

They have the names and the keys of the first publishing platform's artefacts, so that what reads those reads these.
"""

import json
import math
from pathlib import Path
from typing import Any

from mechint.analysis import Latents, load_latents, token_consistency
from mechint.data import open_activations
from mechint.errors import MechintError
from mechint.eval import read_metrics_csv
from mechint.huggingface.files import cached_file
from mechint.models.resolve import resolve_model
from mechint.provenance import sha256_file
from mechint.report.facts import number
from mechint.runs import Run
from mechint.sae import SAE

WEIGHTS, CFG = "sae_weights.safetensors", "cfg.json"
SIDECAR, ENVIRONMENT, FEATURES = f"{WEIGHTS}.json", "environment.json", "feature_analysis.json"
TOP_PROMPTS = 5
PROMPT_TOKENS = 16  # before and after the token that fires
PYTHON = "python"


def finite(value: Any) -> Any:
    """`value` with null for NaN and infinities, which JSON does not have and other programs' readers refuse."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def to_bytes(value: Any) -> bytes:
    """JSON as the files of a run directory: indent 2, sorted keys, newline at the end."""
    return (json.dumps(finite(value), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def sidecar(run: Run, sae: SAE) -> dict[str, Any]:
    """`sae_weights.safetensors.json`: what the SAE is, and how its training went."""
    config = run.config
    losses = [loss for row in read_metrics_csv(run.metrics_path) if (loss := number(row.get("loss"))) is not None]
    return {
        "architecture": sae.architecture,
        "dtype": "torch.float32",
        "hook_site": config.hook_name,
        "input_dim": sae.d_in,
        "k": sae.cfg.k,
        "model_name": config.model_name,
        "n_features": sae.d_sae,
        "training": {
            "batch_size": config.batch_size,
            "final_loss": losses[-1] if losses else None,
            "initial_loss": losses[0] if losses else None,
            "learning_rate": config.learning_rate,
            "steps": config.steps,
        },
    }


def environment(run: Run) -> dict[str, Any]:
    """`environment.json`: versions, seed and device of the training, as the manifest noted them."""
    manifest, config = run.manifest, run.config
    versions = dict(manifest.get("versions") or {})
    torch_version = versions.get("torch")
    return {
        "backend": "mechint",
        "git_commit": manifest.get("git_commit"),
        "kernel": manifest.get("kernel"),
        "model_name": config.model_name,
        "package_versions": {name: version for name, version in sorted(versions.items()) if name != PYTHON},
        "python_version": versions.get(PYTHON),
        "seed": config.seed,
        "torch_runtime": {"version": torch_version, "device": manifest.get("device")},
    }


def feature_analysis(run: Run) -> dict[str, Any] | None:
    """`feature_analysis.json`: what each latent does, from the tables in the run (docs/analysis.md); None without them.

    `coherence_score` is the share of the strongest rows that have the commonest firing token. Prompts need the stored
    activations and the model's tokenizer on this machine; without them `top_prompts` are empty. Nothing is downloaded.
    """
    try:
        latents, record = load_latents(run.path)
    except MechintError:
        return None
    if record.get("checkpoint_sha256") != sha256_file(run.checkpoint_path):
        return None  # tables of other weights
    prompts, coherence = _prompts(run, latents, record)
    counts, top, mean = latents.counts.tolist(), latents.max.tolist(), latents.mean.tolist()
    dead = sum(count == 0 for count in counts)
    features = [
        {
            "feature_index": i,
            "dead": counts[i] == 0,
            "activation_count": counts[i],
            "max_activation": top[i],
            "mean_activation": mean[i],
            "top_prompts": prompts[i] if prompts else [],
            "coherence_score": coherence[i] if coherence else None,
        }
        for i in range(latents.d_sae)
    ]
    return {
        "n_features": latents.d_sae,
        "n_tokens": latents.n_rows,
        "dead_count": dead,
        "live_count": latents.d_sae - dead,
        "mean_features_per_token": latents.l0,
        "features": features,
    }


def _prompts(
    run: Run, latents: Latents, record: dict[str, Any]
) -> tuple[list[list[dict[str, Any]]] | None, list[float | None] | None]:
    """Strongest contexts of each latent, and how alike their firing tokens are; None for what cannot be said here."""
    try:
        activations = open_activations(run.activations_path())
        if activations.sha256 != record.get("activations_sha256") or activations.tokens is None:
            return None, None
        consistency = token_consistency(latents, activations, top=TOP_PROMPTS).tolist()
    except MechintError:
        return None, None
    coherence = [round(value, 6) if value == value else None for value in consistency]
    decode = _decoder(run)
    if decode is None or activations.text_ids is None or activations.context_ids is None:
        return None, coherence
    tokens, texts = activations.tokens.numpy(), activations.text_ids.numpy()
    together = activations.context_ids.numpy()
    rows, values = latents.top_rows[:, :TOP_PROMPTS].tolist(), latents.top_values[:, :TOP_PROMPTS].tolist()
    places, windows = [], []
    for latent in range(latents.d_sae):
        for rank, (row, value) in enumerate(zip(rows[latent], values[latent], strict=True), start=1):
            if row < 0:
                break
            here = slice(max(0, row - PROMPT_TOKENS), row + PROMPT_TOKENS + 1)
            windows.append(tokens[here][(texts[here] == texts[row]) & (together[here] == together[row])].tolist())
            places.append((latent, rank, value))
    found: list[list[dict[str, Any]]] = [[] for _ in range(latents.d_sae)]
    for (latent, rank, value), text in zip(places, decode(windows), strict=True):
        found[latent].append({"rank": rank, "activation": value, "prompt": text})
    return found, coherence


def _decoder(run: Run) -> Any:
    """`decode(list of token lists) -> list of texts` of the run's model, from local files; None without them."""
    source = run.manifest.get("inputs", {}).get("activations", {}).get("model_source") or run.config.model_name
    if source is None:
        return None
    try:
        source = resolve_model(str(source))
    except MechintError:
        return None
    file = Path(source) / "tokenizer.json"
    if not file.is_file() and (file := cached_file(source, "tokenizer.json")) is None:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda windows: tokenizer.decode_batch(windows, skip_special_tokens=False)
