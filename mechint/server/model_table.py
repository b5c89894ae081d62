"""Models by the width of their residual stream: a hint from a dimension, and a check of a dimension against a name."""

import re
from typing import NamedTuple

from mechint.formats.convert import MODELS_OF_WIDTH
from mechint.server.errors import dimension_mismatch

# Widths of models that share one with a better-known model above, or that clients name often.
_MORE = {
    128: ("EleutherAI/pythia-14m",),
    256: ("EleutherAI/pythia-31m",),
    768: ("distilgpt2", "facebook/opt-125m", "EleutherAI/gpt-neo-125m"),
    1152: ("google/gemma-3-1b",),
    1536: ("Qwen/Qwen2.5-1.5B",),
    2048: ("facebook/opt-1.3b",),
    2560: ("google/gemma-3-4b",),
    3584: ("Qwen/Qwen2.5-7B",),
    4096: ("mistralai/Mistral-7B-v0.1", "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen3-8B"),
    4608: ("google/gemma-2-27b",),
    8192: ("meta-llama/Llama-3.1-70B",),
}
# Names that other libraries give to the same models.
_ALIASES = {
    "gpt2-small": "gpt2",
    "gemma-2b-it": "gemma-2b",
    "gemma-7b-it": "gemma-7b",
    "gemma-2-2b-it": "gemma-2-2b",
    "gemma-2-9b-it": "gemma-2-9b",
    "llama-2-7b-hf": "llama-2-7b",
    "llama-2-13b-hf": "llama-2-13b",
    "llama-2-70b-hf": "llama-2-70b",
    "mistral-7b": "mistral-7b-v0.1",
}

# Hooks whose values are as wide as the residual stream.
_RESIDUAL_WIDE = ("resid", "mlp_out", "attn_out", "embed", "mlp_in", "attn_in", "normalized")


class ModelHint(NamedTuple):
    """Which models an SAE of this width may belong to. Never more than a hint: most widths belong to several."""

    d_model: int
    model_name: str | None  # the best known of `candidates`
    candidates: tuple[str, ...]
    ambiguous: bool
    note: str


def hint(d_model: int) -> ModelHint:
    """The models whose residual stream has `d_model` dimensions, the best known first."""
    known = tuple(dict.fromkeys((*MODELS_OF_WIDTH.get(d_model, ()), *_MORE.get(d_model, ()))))
    if not known:
        note = f"no model of width {d_model} is in the table: give model_name"
    elif len(known) == 1:
        note = f"{known[0]} has this width; other models may have it too, so check before relying on it"
    else:
        note = f"{len(known)} models of the table have width {d_model}: a hint, not an answer; give model_name"
    return ModelHint(d_model, known[0] if known else None, known, len(known) > 1, note)


def known_width(model_name: str) -> int | None:
    """The width of a model that the table knows under this name, with or without its owner; None for others."""
    return _WIDTHS.get(_plain(model_name))


def check_dimension(model_name: str | None, d_model: int | None, hook_name: str | None = None) -> None:
    """Raise `dimension_mismatch` if the table knows the model and it has another width. Unknown names pass.

    So do hooks inside a block, such as `mlp.hook_post` or `attn.hook_z`, whose width is not the residual stream's.
    """
    if not model_name or d_model is None:
        return
    if hook_name and not any(part in hook_name for part in _RESIDUAL_WIDE):
        return
    expected = known_width(model_name)
    if expected is not None and expected != d_model:
        raise dimension_mismatch(model_name, expected, d_model)


def common_name(model_name: str) -> str:
    """`gpt2` for `gpt2-small`, which one library calls it; any other name as it is."""
    return "gpt2" if model_name == "gpt2-small" else model_name


def _plain(name: str) -> str:
    """Lower case, without the owner, and without what does not change the width."""
    plain = name.strip().lower().rsplit("/", 1)[-1]
    plain = _ALIASES.get(plain, plain)
    return re.sub(r"(-deduped)(-v0)?$", "", plain) if plain.startswith("pythia-") else plain


def _widths() -> dict[str, int]:
    found: dict[str, int] = {}
    for table in (MODELS_OF_WIDTH, _MORE):
        for width, names in table.items():
            for name in names:
                # two widths under one name would make a claim out of a guess
                assert found.setdefault(_plain(name), width) == width, name
    return found


_WIDTHS = _widths()
