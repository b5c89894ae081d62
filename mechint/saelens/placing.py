"""Where an SAE belongs in a model: the hooks that it reads and writes, and which residual stream they hold."""

import re
from typing import Any

from mechint.errors import MechintError
from mechint.models import LanguageModel
from mechint.sae import SAE

# Hooks that hold the residual stream or what is added to it, which is all that centring changes.
_CENTRED = re.compile(r"(.*\.)?hook_(resid_(pre|mid|post)|mlp_out|attn_out)")


def read_hook(sae: SAE) -> str:
    """The hook that an SAE encodes."""
    name = sae.cfg.metadata.get("hook_name")
    if not name:
        raise MechintError(
            "the SAE does not say which hook it was trained on: set sae.cfg.metadata.hook_name, for example to"
            " 'blocks.3.hook_resid_post'"
        )
    return str(name)


def written_hook(sae: SAE) -> str:
    """The hook whose value an SAE replaces."""
    if not sae.cfg.is_transcoder:
        return read_hook(sae)
    name = sae.cfg.metadata.get("hook_name_out")
    if not name:
        raise MechintError(
            "the transcoder does not say which hook it writes: set sae.cfg.metadata.hook_name_out, for example to"
            " 'blocks.3.hook_mlp_out'"
        )
    return str(name)


def processing_of(sae: SAE) -> str:
    """Which residual stream an SAE was trained on, "raw" or "centred", as its metadata say; raw if they do not."""
    recorded = sae.cfg.metadata.get("processing")
    if recorded is not None:
        return str(recorded)
    kwargs = sae.cfg.metadata.get("model_from_pretrained_kwargs") or {}
    return "centred" if kwargs.get("center_writing_weights") else "raw"


def centres(sae: SAE, hook_name: str, model: LanguageModel) -> bool:
    """Whether the mean over d_model has to be taken off what `hook_name` holds for this SAE.

    Raises:
        MechintError: the model takes off a mean that the SAE was trained with.
    """
    if _CENTRED.fullmatch(hook_name) is None:
        return False
    trained, here = processing_of(sae), model.processing
    if trained == "raw" and here == "centred":
        raise MechintError(
            f"the SAE was trained on the raw {hook_name}, but {model.name} is loaded with"
            " center_writing_weights=True, which takes the mean out: load it without"
        )
    return trained == "centred" and here == "raw"


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Token ids of the roles that SAELens calls special: what else a tokenizer adds, such as the marks of a chat, is
    text like any other."""
    roles = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
    found = (getattr(tokenizer, role, None) for role in roles)
    return frozenset(int(token) for token in found if token is not None)
