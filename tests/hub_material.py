"""Things to publish: a numbered run of the first platform, steering vectors, investigations, a small run directory."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mechint.runs import Run

N_FEATURES, INPUT_DIM, K = 24, 16, 4
# Not the home folder of whoever runs the tests: what another machine wrote down must not go up either.
ELSEWHERE = "/home/somebody/mech/artifacts/run-000051"


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=2, sort_keys=True), encoding="utf-8")
    return path


def make_artifact_run(root: Path, run_id: int = 51, *, model: str | None = "gpt2-medium", seed: int = 0) -> Path:
    """`root/run-000051` with the eight files that the platform writes; without a model the records are left out."""
    folder = root / f"run-{run_id:06d}"
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    decoder = torch.randn(INPUT_DIM, N_FEATURES, generator=draw)
    tensors = {
        "encoder.weight": decoder.t().contiguous(),
        "encoder.bias": 0.1 * torch.randn(N_FEATURES, generator=draw),
        "decoder.weight": decoder,
        "decoder.bias": 0.1 * torch.randn(INPUT_DIM, generator=draw),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    training = {"epochs": 3, "batch_size": 64, "learning_rate": 1e-3, "initial_loss": 2.5, "final_loss": 0.25}
    write(
        folder / "sae_weights.safetensors.json",
        {"dtype": "torch.float32", "input_dim": INPUT_DIM, "k": K, "n_features": N_FEATURES, "training": training},
    )
    if model is None:
        return folder
    prompts = [{"rank": 1, "activation": 2.0, "prompt": "a | b <script> `c`"}]
    write(folder / "feature_analysis.json", {"n_features": N_FEATURES, "features": [{"top_prompts": prompts}]})
    versions = {"numpy": "2.0.0", "torch": "2.5.0"}
    write(
        folder / "environment.json",
        {"seed": 7, "python_version": "3.12.1", "model_name": model, "package_versions": versions},
    )
    parameters = {"model": model, "hook_site": "blocks.8.hook_resid_pre", "n_features": N_FEATURES, "k": K}
    write(folder / "spec.json", {"name": "sae_l8", "family": "sae", "description": "", "parameters": parameters})
    metrics = {
        "reconstruction_mse": 0.25,
        "explained_variance": 0.875,
        "dead_features": 2.0,
        "mean_features_per_token": 4.0,
        "n_tokens": 4096.0,
        "final_loss": float("nan"),
    }
    write(folder / "result.json", {"run_id": run_id, "status": "completed", "metrics": metrics})
    file = {"name": "weights", "path": f"{ELSEWHERE}/sae_weights.safetensors", "sha256": "0" * 64}
    write(folder / "manifest.json", {"run_id": run_id, "artifacts": [file]})
    write(folder / "training_history.json", {"losses": [2.5, 0.25]})
    return folder


def make_vector(folder: Path, *, width: int = 16, sidecar: bool = True, seed: int = 0, **info: Any) -> Path:
    """A steering vector's two files in `folder`."""
    folder.mkdir(parents=True)
    raw = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    save_file({"direction": raw / raw.norm()}, folder / "direction.safetensors")
    if sidecar:
        said = {
            "name": folder.name,
            "model": "builtin/pythia-tiny",
            "hook_site": "blocks.3.hook_resid_post",
            "hidden_dim": width,
            "direction_norm": 15.25,
            "extraction_quality": 1.5,
            "female_prompt_count": 20,
            "male_prompt_count": 22,
            "license": "MIT",
            "description": "Female against male.",
        }
        write(folder / "direction.safetensors.json", said | info)
    return folder


def make_investigation(docs: Path, slug: str = "sae_replication_crisis") -> None:
    """A writeup, and artefacts whose names are those that once overwrote it."""
    text = "---\ntags: [sae]\n---\n\n# The SAE replication crisis\n\nDo latents | replicate?\n\nThe whole *writeup*.\n"
    write(docs / "investigations" / f"{slug}.md", text)
    folder = docs / "publications" / f"{slug}_artifacts"
    write(folder / "metrics.json", {"replicated": 0.4, "file": f"{ELSEWHERE}/metrics.json"})
    write(folder / "paper.md", "# The paper\n")
    write(folder / "README.md", "# An artefact that is called README\n")
    write(folder / "investigation.md", "# An artefact that is called like the writeup\n")
    write(folder / "figures" / "README.md", "nested\n")
    write(folder / "figures" / "data.csv", "a,b\n1,2\n")
    write(folder / ".DS_Store", "x")


def make_tiny_run(root: Path, name: str = "tiny", *, architecture: str = "topk", latents: bool = True) -> Run:
    """A finished run on the built-in world, of a few steps: 256 latents, with evaluation, latents and figures."""
    from mechint.analysis import load_or_gather
    from mechint.config import CollectConfig, SAETrainConfig
    from mechint.data.collect import collect
    from mechint.train import train

    activations = root / "activations" / "few"
    if not activations.exists():
        texts = CollectConfig(model="builtin/pythia-tiny", dataset="builtin/tales", num_texts=30, output=activations)
        collect(texts, progress=False)
    train(
        SAETrainConfig(
            activations_path=str(activations),
            activation_dim=128,
            expansion=2,
            epochs=20,
            batch_size=256,
            architecture=architecture,
            k=8.0 if architecture in ("topk", "batchtopk") else None,
            runs_root=str(root / "runs"),
            run_name=name,
            device="cpu",
        )
    )
    run = Run(root / "runs" / name)
    if latents:
        load_or_gather(run)
    return run
