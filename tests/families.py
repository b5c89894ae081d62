"""Small random models of many families, from transformers' own configs, and a tokenizer of each kind.

Each has a few thousand parameters, 3 layers and nothing at its default value: gains that are not 1, biases that are not
0, so that a forgotten norm or a bias shows. `make_family(name, folder)` saves one; `FAMILIES` is the list.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

D_MODEL, N_LAYERS, N_HEADS, N_CTX, VOCABULARY = 32, 3, 4, 64, 420

CORPUS = [
    "the cat sat on the mat and the dog ran far away from home again",
    "Once upon a time there was a king; he had three daughters, and 12 horses.",
    "Größe, naïve café: ¿qué? — «да» 日本語 🙂",
]


@dataclass(frozen=True)
class Family:
    """A family: `model_type` of transformers with settings on top of the shared ones, and which tokenizer it has."""

    model_type: str
    settings: dict[str, Any]
    tokenizer: str = "byte-level"
    # whether every reader of the residual stream subtracts the mean, so that "centred" has a meaning
    centres: bool = False
    # how far parameters are from their initial values; less where activations would grow out of float32's precision
    noise: float = 0.2


# Under the names that most configs use; others have their own, in the table below.
_SHARED: dict[str, Any] = {
    "hidden_size": D_MODEL, "intermediate_size": 40, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS,
    "num_key_value_heads": 2, "max_position_embeddings": N_CTX, "head_dim": D_MODEL // N_HEADS,
}  # fmt: skip
_WITHOUT_GQA = {key: value for key, value in _SHARED.items() if key not in ("num_key_value_heads", "head_dim")}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": N_CTX}
_FALCON = {**_WITHOUT_GQA, "alibi": False}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", _SHARED, "byte-fallback"),
    "mistral": Family("mistral", {**_SHARED, "sliding_window": 8}, "byte-fallback"),
    "mixtral": Family("mixtral", {**_SHARED, **_MOE}, "byte-fallback"),
    "qwen2": Family("qwen2", _SHARED, "no-bos"),
    "qwen2_moe": Family("qwen2_moe", {**_SHARED, **_MOE, "shared_expert_intermediate_size": 16}, "no-bos"),
    "qwen3": Family("qwen3", _SHARED, "no-bos"),
    "qwen3_moe": Family("qwen3_moe", {**_SHARED, **_MOE}, "no-bos"),
    "gemma": Family("gemma", _SHARED, "unigram"),
    "gemma2": Family(
        "gemma2", {**_SHARED, "sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": _SLIDING}, "unigram"
    ),
    "gemma3_text": Family(
        "gemma3_text", {**_SHARED, "sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": _SLIDING}, "unigram"
    ),
    # a vision tower with as many layers as the text model, and a config whose sizes are in its text part
    "gemma3": Family(
        "gemma3",
        {
            "text_config": {
                **_SHARED,
                "sliding_window": 8,
                "query_pre_attn_scalar": 8,
                "layer_types": _SLIDING,
                "vocab_size": VOCABULARY,
                "model_type": "gemma3_text",
            },
            "vision_config": {
                "hidden_size": D_MODEL,
                "intermediate_size": 24,
                "num_hidden_layers": N_LAYERS,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
        },
        "unigram",
    ),  # fmt: skip
    "olmo": Family("olmo", _SHARED, "byte-level", centres=True),
    "olmo2": Family("olmo2", _SHARED),
    "olmo3": Family("olmo3", {**_SHARED, "sliding_window": 8, "layer_types": _SLIDING}),
    "phi": Family("phi", _WITHOUT_GQA, centres=True),
    "phi3": Family("phi3", {**_SHARED, "original_max_position_embeddings": N_CTX}, "byte-fallback"),
    "gpt2": Family("gpt2", _GPT, centres=True),
    "gptj": Family("gptj", {**_GPT, "rotary_dim": 4}, centres=True),
    "gpt_neo": Family(
        "gpt_neo",
        {
            "hidden_size": D_MODEL,
            "num_layers": N_LAYERS,
            "num_heads": N_HEADS,
            "max_position_embeddings": N_CTX,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 8,
        },
        centres=True,
    ),  # fmt: skip
    "gpt_neox": Family("gpt_neox", _WITHOUT_GQA, centres=True),
    "gpt_neox_sequential": Family("gpt_neox", {**_WITHOUT_GQA, "use_parallel_residual": False}, centres=True),
    "opt": Family(
        "opt",
        {**_WITHOUT_GQA, "ffn_dim": 40, "word_embed_proj_dim": D_MODEL, "pad_token_id": 1},
        "left-padded",
        centres=True,
    ),
    # the layout of OPT-350m: norms behind the residual additions, and no final one
    "opt_post_norm": Family(
        "opt",
        {
            **_WITHOUT_GQA,
            "ffn_dim": 40,
            "word_embed_proj_dim": D_MODEL,
            "pad_token_id": 1,
            "do_layer_norm_before": False,
        },
        "left-padded",
    ),  # fmt: skip
    "bloom": Family("bloom", {"hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS}, centres=True),
    "mpt": Family(
        "mpt", {"d_model": D_MODEL, "n_layers": N_LAYERS, "n_heads": N_HEADS, "max_seq_len": N_CTX}, centres=True
    ),
    "falcon": Family("falcon", _FALCON, "no-bos", centres=True),
    "falcon_new": Family(
        "falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, "no-bos", centres=True
    ),
    "stablelm": Family("stablelm", _SHARED, centres=True),
    "starcoder2": Family("starcoder2", _SHARED, centres=True),
    "cohere": Family("cohere", _SHARED, centres=True),
    "mamba": Family("mamba", {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "state_size": 4, "expand": 2}),
    "gpt_oss": Family(
        "gpt_oss",
        {
            **_SHARED,
            **_MOE,
            "sliding_window": 8,
            "layer_types": _SLIDING,
            "intermediate_size": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),  # fmt: skip
    "granite": Family(
        "granite", {**_SHARED, "residual_multiplier": 0.7, "embedding_multiplier": 2.0, "logits_scaling": 1.5}
    ),
    "smollm3": Family("smollm3", {**_SHARED, "pad_token_id": 0}),
    "nemotron": Family("nemotron", _SHARED, "byte-fallback", centres=True, noise=0.1),
    "glm4": Family("glm4", _SHARED),
    "xglm": Family(
        "xglm",
        {
            "d_model": D_MODEL,
            "ffn_dim": 40,
            "num_layers": N_LAYERS,
            "attention_heads": N_HEADS,
            "max_position_embeddings": N_CTX,
            "pad_token_id": 1,
        },
        "unigram",
        centres=True,
    ),  # fmt: skip
}


def make_family(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Save the family's model and tokenizer into `folder`; the folder."""
    family = FAMILIES[name]
    tokenizer = TOKENIZERS[family.tokenizer]()
    tokenizer.save_pretrained(folder)
    return save_model(family.model_type, family.settings, folder, seed=seed, noise=family.noise)


def save_model(model_type: str, settings: dict[str, Any], folder: Path, *, seed: int = 0, noise: float = 0.2) -> Path:
    """A random causal language model of the type, saved into `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": VOCABULARY}
    config = AutoConfig.for_model(model_type, **{**ids, **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Gains of 1 (or of 0, where 1 is added) and biases of 0 would hide a forgotten norm or bias.
            parameter.add_(noise * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


# --- tokenizers of each kind ------------------------------------------------------------------------------------------


def _fast(tokenizer: Any, **special: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=N_CTX, **special)


def byte_level(**special: Any) -> Any:
    """Byte-level BPE, as GPT-2 and Pythia have: spaces are part of the tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return _fast(tokenizer, **(special or {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}))


def no_bos() -> Any:
    """Byte-level BPE without a BOS, as Qwen has."""
    return byte_level(eos_token="<|endoftext|>", pad_token="<pad>")


def left_padded() -> Any:
    """Byte-level BPE that pads on the left."""
    return byte_level(bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<pad>", padding_side="left")


def byte_fallback() -> Any:
    """BPE over "▁" for spaces with bytes for what it does not know, as Llama's SentencePiece files hold."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in CORPUS[:2] * 20], trainer)
    return _fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> Any:
    """Unigram over "▁" for spaces with bytes for what it does not know, as Gemma's and T5's SentencePiece files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = {piece for line in CORPUS[:2] for word in line.split() for piece in (f"▁{word}", word, *word, "▁")}
    special = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    scored = [(token, 0.0) for token in special] + [(piece, -5.0 - 3 / len(piece)) for piece in sorted(pieces)]
    tokenizer = Tokenizer(models.Unigram(scored[:VOCABULARY], unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> Any:
    """WordPiece, as BERT has: "##" before what goes on a word, spaces in no token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return _fast(tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "no-bos": no_bos,
    "left-padded": left_padded,
    "byte-fallback": byte_fallback,
    "unigram": unigram,
    "word-piece": word_piece,
}
