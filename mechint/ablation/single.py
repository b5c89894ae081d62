"""One text at a time: the hook that removes a latent, its effect position by position."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.ablation.engines import Pair, following, make_engine
from mechint.ablation.kl import Effect, effect_of_log_probs
from mechint.ablation.rank import feature_indices
from mechint.inside import Model, as_model, check_fit, written_acts
from mechint.models import load_model
from mechint.models.matmul import full_float32
from mechint.models.pieces import decoder, token_strings
from mechint.sae import SAE


def build_transformer_model(model_name: str, *, device: str | None = None, processing: str = "centred") -> Any:
    """A `TransformerBridge` of a model by Hub id, alias, local folder or builtin/pythia-tiny.

    `processing` "centred", the default here, is what the original pipeline worked on (LayerNorm folded, residual
    without its mean) and what its checkpoints need; an SAE trained on raw activations needs "raw". For ranking,
    `mechint.models.load_model` gives the same numbers faster.
    """
    return load_model(model_name, device=device, processing=processing, backend="bridge").bridge


def single_feature_ablation_hook(
    sae: SAE, feature_idx: int | Sequence[int]
) -> Callable[[Float[Tensor, "*batch d_in"], Any], Float[Tensor, "*batch d_in"]]:
    """A hook for `run_with_hooks` that removes a latent (or several at once): resid - f_i(resid) * W_dec[i]."""
    features = feature_indices([feature_idx] if isinstance(feature_idx, int) else feature_idx, sae.d_sae)

    def remove(resid: Float[Tensor, "*batch d_in"], hook: Any = None) -> Float[Tensor, "*batch d_in"]:
        feature_acts = written_acts(sae, resid.to(sae.W_enc))[..., features]
        return resid - (feature_acts @ sae.W_dec[features]).to(resid)

    return remove


def compute_text_kl(
    model: Any, text: str, hook_name: str, hook_fn: Callable[..., Float[Tensor, "*batch d_in"] | None]
) -> dict[str, Any]:
    """What an edit at a hook does to the predictions at each position of a text, BOS prepended; in nats.

    Args:
        model: a `LanguageModel`, or a `TransformerBridge`.
        hook_fn: called as TransformerLens calls it, `hook_fn(value, hook=point)`, where the point has the `name` of the
            hook; such as `single_feature_ablation_hook` makes. If it returns None, the value stays.

    Returns:
        `text`, `token_ids`, `tokens`, `kl` (clean || edited), `ce_change`, `mean_kl`, `mean_kl_no_bos`, `max_kl`,
        `max_kl_token`, `max_kl_token_position`, as `latent_text_kl` has them, from the model's own float32 logits.
    """
    known = as_model(model)
    shape = known.hook_shape(hook_name)
    (tokens,) = known.tokenize([text], prepend_bos=True)
    point = SimpleNamespace(name=hook_name)

    def edit(value: Tensor) -> Tensor:
        edited = hook_fn(value.unflatten(-1, shape), hook=point)  # heads one by one, as TransformerLens has them
        return value if edited is None else edited.flatten(2)

    whole, length = torch.tensor([tokens]), len(tokens)
    with torch.inference_mode(), full_float32():
        clean, edited = known.logits(whole)[0], known.logits_with(whole, hook_name, edit)[0]
        effect = effect_of_log_probs(clean, edited, following([tokens], length)[0])
    return _by_position(known, text, tokens, effect, n_bos=1)


def latent_text_kl(
    sae: SAE,
    model: Any,
    hook_name: str,
    text: str,
    feature_idx: int | Sequence[int],
    *,
    prepend_bos: bool | None = None,
    context_size: int | None = None,
) -> dict[str, Any]:
    """What removing a latent, or several together, does to the predictions at each position of a text.

    Returns:
        `text`, `features`, `token_ids`, `tokens` (strings), and per position `kl` (nats, clean || ablated) and
        `feature_acts` (summed over the latents, as `written_acts` has them); `mean_kl`, `mean_kl_no_bos`, `max_kl`,
        `max_kl_token`, `max_kl_token_position`, `n_active_positions`; `ce_change`, per position, of the text's own next
        token (0 at the last). In float64 from the embedding on for a GPT-NeoX.
    """
    known = as_model(model)
    features = feature_indices([feature_idx] if isinstance(feature_idx, int) else feature_idx, sae.d_sae)
    if prepend_bos is None:
        prepend_bos = bool(sae.metadata.get("prepend_bos", True))
    (tokens,) = known.tokenize([text], prepend_bos=prepend_bos, context_size=context_size)
    with torch.inference_mode(), full_float32():
        check_fit(sae, known, hook_name)
        engine = make_engine(sae, known, hook_name, tokens)
        acts = engine.open([tokens])[0][:, features].cpu()
        active = torch.nonzero((acts != 0).any(1)).flatten().tolist()
        nothing = torch.zeros(len(tokens), dtype=torch.float64)
        effect = Effect(nothing, nothing)
        if active:
            pair = Pair(0, tuple(features), active[0])
            effect = Effect(*(part[0] for part in engine.precise_effect([pair])))
    return {
        **_by_position(known, text, tokens, effect, n_bos=int(prepend_bos)),
        "features": features,
        "feature_acts": acts.sum(1).tolist(),
        "n_active_positions": len(active),
    }


def _by_position(model: Model, text: str, tokens: list[int], effect: Effect, n_bos: int) -> dict[str, Any]:
    kl = effect.kl.cpu().clamp(min=0)
    names = token_strings(decoder(model.tokenizer), tokens)
    highest, rest = int(kl.argmax()), kl[n_bos:]
    return {
        "text": text,
        "token_ids": tokens,
        "tokens": names,
        "kl": kl.tolist(),
        "ce_change": effect.ce_change.tolist(),
        "mean_kl": float(kl.mean()),
        "mean_kl_no_bos": float(rest.mean()) if len(rest) else 0.0,
        "max_kl": float(kl[highest]),
        "max_kl_token": names[highest],
        "max_kl_token_position": highest,
    }
