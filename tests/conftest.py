"""Shared fixtures: a small random GPT-NeoX on disk, made in a second, with nothing about it left at its default."""

import os
from pathlib import Path

import pytest
from shapes import check_shapes

check_shapes("mechint")

# Tests never ask a real Hub; those that need one start tests/loopback_hub.py in a subprocess's environment.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the commands do; several workers share the cores here

HOOK = "blocks.3.hook_resid_post"


def make_tiny_neox(folder: Path, *, seed: int = 0, d_model: int = 32) -> Path:
    """Save a random 6-layer GPT-NeoX and a byte-level BPE tokenizer into `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
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
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog ran far away from home again"] * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special, eos_token=special, unk_token=special, model_max_length=128
    )
    config = GPTNeoXConfig(
        vocab_size=len(fast),
        hidden_size=d_model,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=2 * d_model,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gains of 1 and biases of 0 would hide a forgotten LayerNorm or bias.
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" in name:
                parameter.mul_(20.0)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_neox_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random GPT-NeoX (d_model 32, 6 layers, 128 positions) and its tokenizer."""
    return make_tiny_neox(tmp_path_factory.mktemp("tiny_neox"))
