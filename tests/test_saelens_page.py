"""What a reference page on SAELens 3 to 5 calls, name by name and in its order; only the package, the device and the
sizes are changed. GPT-2, the release of its SAEs and the data sets come from a Hub on this machine."""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback_hub import LoopbackHub
from safetensors.torch import save_file

from mechint.builtin.tales import tale

pytestmark = pytest.mark.slow

D_MODEL, D_SAE, LAYERS, CONTEXT = 48, 192, 9, 128
HOOK = "blocks.8.hook_resid_pre"


def make_tiny_gpt2(folder: Path) -> Path:
    """A random GPT-2 of nine layers, with no bias or gain at its default, and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    special = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([tale(i, "train", 0).text for i in range(20)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special, eos_token=special, unk_token=special, model_max_length=256
    )
    config = GPT2Config(
        vocab_size=len(fast), n_embd=D_MODEL, n_layer=LAYERS, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(8.0)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_release(folder: Path) -> dict[str, torch.Tensor]:
    """An SAE as the repository of gpt2-small-res-jb has them: keys of SAELens 2, trained on the centred stream."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    shapes = {"W_enc": (D_MODEL, D_SAE), "W_dec": (D_SAE, D_MODEL), "b_enc": (D_SAE,), "b_dec": (D_MODEL,)}
    tensors = {name: torch.randn(*shape, generator=generator) / D_MODEL**0.5 for name, shape in shapes.items()}
    cfg = {
        "model_name": "gpt2-small",
        "hook_point": HOOK,
        "hook_point_layer": 8,
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "is_dataset_tokenized": False,
        "context_size": CONTEXT,
        "use_cached_activations": False,
        "d_in": D_MODEL,
        "n_batches_in_buffer": 128,
        "total_training_tokens": 300_000_000,
        "store_batch_size": 32,
        "device": "mps",
        "seed": 42,
        "dtype": "torch.float32",
        "b_dec_init_method": "geometric_median",
        "expansion_factor": 4,
        "d_sae": D_SAE,
    }
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file(tensors, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.full((D_SAE,), -2.5)}, folder / "sparsity.safetensors")
    return tensors


def parquet(texts: list[str]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink)
    return sink.getvalue()


# The page's blocks in its order; DEVICE stands where it says "cuda".
LOADING = """
from mechint import SAE

sae, cfg_dict, sparsity = SAE.from_pretrained(
    release="gpt2-small-res-jb",
    sae_id="blocks.8.hook_resid_pre",
    device="DEVICE"
)
official, official_cfg, official_sparsity = sae, cfg_dict, sparsity

sae, cfg_dict, sparsity = SAE.from_pretrained(
    release="username/repo-name",
    sae_id="path/to/sae",
    device="DEVICE"
)
from_hub = sae
official.save_model("path/to/sae")

sae = SAE.load_from_disk("path/to/sae", device="DEVICE")

print(sae.cfg.d_in)
print(sae.cfg.d_sae)
print(sae.cfg.hook_name)
"""
CONFIG = """
from mechint import LanguageModelSAERunnerConfig

cfg = LanguageModelSAERunnerConfig(
    model_name="gpt2-small",
    hook_name="blocks.8.hook_resid_pre",
    hook_layer=8,
    d_in=768,

    architecture="standard",
    d_sae=768 * 8,
    activation_fn="relu",

    lr=4e-4,
    l1_coefficient=8e-5,
    lp_norm=1.0,
    lr_scheduler_name="constant",
    lr_warm_up_steps=500,

    l1_warm_up_steps=1000,
    use_ghost_grads=True,
    feature_sampling_window=1000,
    dead_feature_window=5000,
    dead_feature_threshold=1e-8,

    dataset_path="monology/pile-uncopyrighted",
    streaming=True,
    context_size=128,

    train_batch_size_tokens=4096,
    store_batch_size_prompts=16,
    n_batches_in_buffer=64,

    training_tokens=100_000_000,

    log_to_wandb=True,
    wandb_project="sae-training",
    wandb_log_frequency=100,

    checkpoint_path="checkpoints",
    n_checkpoints=5,

    device="cuda",
    dtype="float32",
)
"""
ARCHITECTURES = """
LanguageModelSAERunnerConfig(architecture="standard", activation_fn="relu", l1_coefficient=8e-5)
LanguageModelSAERunnerConfig(architecture="gated")
LanguageModelSAERunnerConfig(
    architecture="topk",
    activation_fn="topk",
    activation_fn_kwargs={"k": 50},
)
LanguageModelSAERunnerConfig(architecture="jumprelu")
"""
TRAINING = """
import dataclasses
cfg = dataclasses.replace(
    cfg, d_in=D_MODEL, d_sae=D_MODEL * 4, training_tokens=6_400, train_batch_size_tokens=256, lr_warm_up_steps=5,
    l1_warm_up_steps=5, log_to_wandb=WANDB, wandb_log_frequency=5, n_eval_batches=1, device="DEVICE"
)

from mechint import SAETrainingRunner, LanguageModelSAERunnerConfig

runner = SAETrainingRunner(cfg)
sae = runner.run()
"""
STORE = """
from mechint import HookedSAETransformer

model = HookedSAETransformer.from_pretrained("gpt2-small")
sae = official

from mechint import ActivationsStore

store = ActivationsStore.from_sae(
    model=model,
    sae=sae,
    store_batch_size_prompts=8,
    train_batch_size_tokens=4096,
    n_batches_in_buffer=32,
    device="DEVICE",
)

activations = store.get_batch_tokens()
tokens = activations
"""
METHODS = """
activations = store.get_activations(tokens)
features = sae.encode(activations)
reconstructed = sae.decode(features)
called = sae(activations)
sae.save_model("path/to/save")
"""
HOOKED = """
from mechint import HookedSAETransformer

model = HookedSAETransformer.from_pretrained("gpt2-small")
model.add_sae(sae)

output = model.run_with_saes(tokens, saes=[sae])

output, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
"""
UPLOAD = """
from mechint import upload_saes_to_huggingface

upload_saes_to_huggingface(
    saes=[sae],
    repo_id="username/my-saes",
    token="TOKEN",
)
"""
# What came out, for the test to look at.
REPORT = """
import json
import torch
from mechint.runs import Run
from mechint.saelens import neuronpedia_url

model.reset_saes()
centred = HookedSAETransformer.from_pretrained("gpt2-small", center_writing_weights=True)
expected = centred.run_with_saes(tokens, saes=[sae])
shapes = {name: list(value.shape) for name, value in
          {"tokens": tokens, "activations": activations, "features": features, "reconstructed": reconstructed}.items()}
print("REPORT" + json.dumps({
    "shapes": shapes,
    "W_enc": float(official.W_enc.sum()),
    "sparsity": float(official_sparsity.mean()),
    "cfg": official_cfg,
    "same": float((called - reconstructed).abs().max()),
    "mean": float(activations.mean(-1).abs().max()),
    "centred": float((output.log_softmax(-1) - expected.log_softmax(-1)).abs().max()),
    "moves": float((output - model(tokens)).abs().max()),
    "acts": float((cache[f"{sae.cfg.hook_name}.hook_sae_acts_post"] - features).abs().max()),
    "url": neuronpedia_url(official, 1234 % official.cfg.d_sae),
    "from_hub": from_hub.cfg.d_sae,
    "run": str(runner.run_dir),
    "steps": Run(runner.run_dir).config.epochs,
    "trained": list(SAE.load_from_disk(runner.run_dir).W_dec.shape),
    "metrics": sorted(name for name, value in runner.metrics().items() if value is not None),
}))
"""
BLOCKS = [LOADING, CONFIG, ARCHITECTURES, TRAINING, STORE, METHODS, HOOKED, UPLOAD, REPORT]


def test_every_block_runs(tmp_path: Path):
    weights = make_release(tmp_path / "release" / HOOK)
    make_release(tmp_path / "other" / "path" / "to" / "sae")
    make_tiny_gpt2(tmp_path / "gpt2")
    wandb = importlib.util.find_spec("wandb") is not None
    texts = [tale(i, "train", 3).text for i in range(300)]
    with LoopbackHub(tmp_path / "hub", user="username") as hub:
        hub.add_repo("openai-community/gpt2", tmp_path / "gpt2")
        hub.add_repo("jbloom/GPT2-Small-SAEs-Reformatted", tmp_path / "release")
        hub.add_repo("username/repo-name", tmp_path / "other")
        hub.add_repo("Skylion007/openwebtext", {"data/train-0.parquet": parquet(texts)}, type="dataset")
        hub.add_repo("monology/pile-uncopyrighted", {"data/train-0.parquet": parquet(texts)}, type="dataset")
        values = {"DEVICE": "cpu", "D_MODEL": str(D_MODEL), "WANDB": str(wandb), "TOKEN": hub.token}
        code = "\n".join(BLOCKS)
        for name, value in values.items():
            code = code.replace(name, value)
        env = hub.env(tmp_path / "hf") | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-4000:]
        uploaded = hub.files("username/my-saes")
        assert not hub.seen("OUTSIDE")
        # on a machine without CUDA the page's own device is one line, and nothing is downloaded
        if not torch.cuda.is_available():
            before = len(hub.requests)
            told = subprocess.run(
                [sys.executable, "-c", LOADING.replace("DEVICE", "cuda")],
                env=hub.env(tmp_path / "hf-2"),
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert "device 'cuda' cannot be used here" in told.stderr.strip().splitlines()[-1]
            assert told.returncode and len(hub.requests) == before
    found: dict[str, Any] = json.loads(done.stdout.split("REPORT")[1])
    assert found["shapes"] == {
        "tokens": [8, CONTEXT],
        "activations": [8, CONTEXT, D_MODEL],
        "features": [8, CONTEXT, D_SAE],
        "reconstructed": [8, CONTEXT, D_MODEL],
    }
    assert found["W_enc"] == pytest.approx(float(weights["W_enc"].sum()), rel=1e-5)
    assert found["sparsity"] == pytest.approx(-2.5) and found["from_hub"] == D_SAE
    metadata = found["cfg"]["metadata"]
    assert (metadata["hook_name"], metadata["model_name"], metadata["context_size"]) == (HOOK, "gpt2-small", CONTEXT)
    # this release is of the centred stream: it gets it, and predictions are those of a centred model
    assert found["same"] < 1e-5 and found["mean"] < 1e-4 and found["acts"] < 1e-3
    assert found["centred"] < 1e-3 < 0.1 < found["moves"]
    assert found["url"] == f"https://www.neuronpedia.org/gpt2-small/8-res-jb/{1234 % D_SAE}"
    files = {f"{HOOK}/{name}" for name in ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors")}
    assert files <= set(uploaded)
    assert found["run"].startswith("checkpoints/") and found["trained"] == [D_MODEL * 4, D_MODEL]
    assert found["steps"] == 25
    # what a model of random weights loses by zeroing a hook is no loss, so that ce_loss_score may be undefined
    assert {"l0", "mse_loss", "l1_loss", "dead_features"} <= set(found["metrics"])
    assert "AuxK" in done.stderr and "held out" in done.stderr  # what is done otherwise is said
    if wandb:
        assert list((tmp_path / found["run"]).glob("wandb/offline-run-*"))
