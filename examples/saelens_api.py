"""SAELens's API on mechint, end to end: train, inspect, save, publish, load, put into the model.

    python examples/saelens_api.py                          # half a minute on the built-in model, no network
    python examples/saelens_api.py --repo USER/my-saes      # also uploads to the Hub (log in first), loads from it
    python examples/saelens_api.py --release gpt2-small-res-jb blocks.8.hook_resid_pre    # and into its own model

Code that imports these names from `sae_lens` runs with the import changed; docs/saelens.md says what differs.
"""

import argparse
from pathlib import Path

import torch

from mechint import (
    SAE,
    ActivationsStore,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    SAEConfig,
    SAETrainingRunner,
    upload_saes_to_huggingface,
)
from mechint.saelens import neuronpedia_url, parse_neuronpedia

MODEL, HOOK, D_IN = "builtin/pythia-tiny", "blocks.3.hook_resid_post", 128


def configs(folder: Path, tokens: int) -> dict[str, LanguageModelSAERunnerConfig]:
    """One training for each architecture of the flat form."""
    common = {
        # model and hook
        "model_name": MODEL,
        "hook_name": HOOK,
        "hook_layer": 3,
        "d_in": D_IN,
        # data
        "dataset_path": "builtin/tales",
        "streaming": True,
        "context_size": 64,
        "exclude_special_tokens": True,
        # batch sizes
        "train_batch_size_tokens": 512,
        "store_batch_size_prompts": 16,
        "n_batches_in_buffer": 16,
        # training
        "training_tokens": tokens,
        "lr": 4e-3,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": 20,
        "normalize_activations": "expected_average_only_in",
        # dead features
        "feature_sampling_window": 1000,
        "dead_feature_window": 50,
        "dead_feature_threshold": 1e-8,
        # logs and checkpoints
        "log_to_wandb": False,
        "wandb_project": "sae-training",
        "wandb_log_frequency": 100,
        "checkpoint_path": str(folder / "checkpoints"),
        "n_checkpoints": 2,
        # hardware
        "device": "cpu",
        "dtype": "float32",
        "verbose": False,
    }
    return {
        "standard": LanguageModelSAERunnerConfig(
            **common,
            architecture="standard",
            d_sae=D_IN * 4,
            activation_fn="relu",
            l1_coefficient=0.6,
            lp_norm=1.0,
            l1_warm_up_steps=40,
            use_ghost_grads=True,
        ),
        "gated": LanguageModelSAERunnerConfig(**common, architecture="gated", expansion_factor=4, l1_coefficient=0.6),
        "topk": LanguageModelSAERunnerConfig(
            **common, architecture="topk", activation_fn="topk", activation_fn_kwargs={"k": 16}, expansion_factor=4
        ),
        "jumprelu": LanguageModelSAERunnerConfig(
            **common,
            architecture="jumprelu",
            expansion_factor=4,
            l1_coefficient=0.3,
            jumprelu_init_threshold=0.01,
            jumprelu_bandwidth=0.05,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("saelens_api"), help="where everything is written")
    parser.add_argument("--repo", help="a repository of yours on the Hub, USER/NAME; without it nothing is uploaded")
    parser.add_argument("--token", help="of the Hub; the one that you are logged in with if not given")
    parser.add_argument("--release", nargs=2, metavar=("RELEASE", "SAE_ID"), help="also puts this SAE into its model")
    parser.add_argument("--tokens", type=int, default=60_000, help="training tokens of each SAE")
    given = parser.parse_args()

    # Train
    saes: dict[str, SAE] = {}
    for name, cfg in configs(given.folder, given.tokens).items():
        runner = SAETrainingRunner(cfg)
        saes[name] = runner.run()
        metrics = {key: round(value, 3) for key, value in runner.metrics().items() if value is not None}
        print(f"{name}: {metrics}, in {runner.run_dir}")
    sae = saes["standard"]

    # The configuration of an SAE, and its weights
    assert isinstance(sae.cfg, SAEConfig)
    print(f"d_in {sae.cfg.d_in}, d_sae {sae.cfg.d_sae}, {sae.cfg.architecture}, {sae.cfg.activation_fn_str}")
    print(f"trained on {sae.cfg.model_name} at {sae.cfg.hook_name}, normalised: {sae.cfg.normalize_activations}")
    print("W_enc", list(sae.W_enc.shape), "W_dec", list(sae.W_dec.shape))
    print("b_enc", list(sae.b_enc.shape), "b_dec", list(sae.b_dec.shape))

    # Save and load
    sae.save_model(given.folder / "saved")
    sae = SAE.load_from_disk(given.folder / "saved", device="cpu")

    # Publish, and load what was published: an SAE, its configuration, and how often each feature fires
    if given.repo is None:
        release, sae_id = str(given.folder), "saved"
    else:
        upload_saes_to_huggingface(saes=[sae], repo_id=given.repo, token=given.token)
        upload_saes_to_huggingface({f"{HOOK}/{name}": other for name, other in saes.items()}, given.repo)
        release, sae_id = given.repo, HOOK
    sae, cfg_dict, sparsity = SAE.from_pretrained(release=release, sae_id=sae_id, device="cpu")
    assert sparsity is not None
    print(f"loaded {release} {sae_id}: {cfg_dict['architecture']}, fires log10 {sparsity.median():.2f} (median)")

    # Activations: token ids in windows, what the hook holds for them, shuffled batches of rows
    model = HookedSAETransformer.from_pretrained(MODEL)
    store = ActivationsStore.from_sae(
        model=model,
        sae=sae,
        store_batch_size_prompts=8,
        train_batch_size_tokens=256,
        n_batches_in_buffer=8,
        device="cpu",
    )
    tokens = store.get_batch_tokens()
    activations = store.get_activations(tokens)
    print("tokens", list(tokens.shape), "activations", list(activations.shape), "batch", list(store.next_batch().shape))

    # Encode, decode, reconstruct: [batch, pos, d_in] or any leading shape
    features = sae.encode(activations)
    reconstructed = sae.decode(features)
    torch.testing.assert_close(reconstructed, sae(activations))
    print(f"features {list(features.shape)}, {(features > 0).float().sum(-1).mean():.1f} active a token")

    # In the model: attached until taken off, or for one pass; its stages are hooks like any other
    model.add_sae(sae)
    attached = model(tokens)
    model.reset_saes()
    clean = model(tokens)
    output = model.run_with_saes(tokens, saes=[sae])
    torch.testing.assert_close(output, attached)
    exact = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    print(
        f"logits move by {(output - clean).abs().mean():.3f}; with the error term by {(exact - clean).abs().mean():.6f}"
    )
    output, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    acts = cache[f"{HOOK}.hook_sae_acts_post"]
    strongest = int(acts[:, 1:].flatten(0, 1).sum(0).argmax())

    def without(acts: torch.Tensor, hook: object) -> torch.Tensor:
        acts[..., strongest] = 0.0
        return acts

    ablated = model.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=[(f"{HOOK}.hook_sae_acts_post", without)])
    print(f"feature {strongest} taken out: logits move by {(ablated - output).abs().mean():.3f}")

    # Pages on Neuronpedia: neuronpedia.org/{model}/{layer}-{sae_type}/{feature_id}
    page = parse_neuronpedia("https://www.neuronpedia.org/gpt2-small/8-res-jb/1234")
    print(f"{page}: feature {page.index} of {page.source} at layer {page.layer} of {page.model}")

    # An SAE that somebody published under a name, in the model that it was trained on
    if given.release is not None:
        release, sae_id = given.release
        sae, cfg_dict, sparsity = SAE.from_pretrained(release=release, sae_id=sae_id, device="cpu")
        model = HookedSAETransformer.from_pretrained(str(sae.cfg.model_name))
        tokens = model.to_tokens("The little fox ran into the forest and found a lamp.")
        output, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
        acts = cache[model.get_sae_hook_name(sae)]
        active = (acts[:, 1:] > 0).float().sum(-1).mean()
        print(f"{release} {sae_id} in {sae.cfg.model_name}: {active:.1f} of {sae.cfg.d_sae} features active a token")
        if sae.cfg.neuronpedia_id:
            print("its strongest feature:", neuronpedia_url(sae, int(acts[:, 1:].flatten(0, 1).sum(0).argmax())))


if __name__ == "__main__":
    main()
