"""The only file that imports transformer_lens. Works with 3.9 and 4.x, through `TransformerBridge`."""

from typing import Any

import torch


def boot_bridge(source: str, *, hf_model: Any, tokenizer: Any, device: str, dtype: torch.dtype, centred: bool) -> Any:
    """A `TransformerBridge` around an already loaded Hugging Face model.

    `centred` gives the numerics of the old `HookedTransformer.from_pretrained` (LayerNorm folded, weights centred);
    otherwise every hook holds exactly what the Hugging Face model computes. Switches `hf_model` to eager attention.
    """
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        source, hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=dtype
    )
    bridge.enable_compatibility_mode(no_processing=not centred)
    # The bridge's default is False for GPT-NeoX; the original pipeline, and mechint everywhere, prepends BOS to texts.
    bridge.cfg.default_prepend_bos = True
    return bridge


def is_bridge(model: Any) -> bool:
    """Whether `model` is a `TransformerBridge`, without importing transformer_lens for anything else."""
    return any(cls.__name__ == "TransformerBridge" for cls in type(model).__mro__)
