"""Which output tokens a latent promotes and suppresses by itself: its decoder direction read by the unembedding.

    effect[i, t] = (c(W_dec[i]) * gain) . W_U[t]  -  the mean of that over the vocabulary

c takes the mean over d_model off where the final norm does (LayerNorm; not RMSNorm), gain is the final norm's weight,
W_U the unembedding. This is the direct effect only: the change in the logits that one unit of the latent, added to the
residual stream, makes through no later layer. The final norm also divides by the size of the residual stream, which
differs from position to position and is left out: effects of one latent can be compared with each other, and those of
two latents with each other, but they are not logits. Softmax does not see a number that all tokens share, so the mean
is taken off. Known as "logit weights" (Bricken et al. 2023, "Towards Monosemanticity", feature interface).
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.errors import MechintError
from mechint.inside import in_residual
from mechint.models import LanguageModel
from mechint.sae import SAE

# [latents, d_vocab] block of effects made at once: 128 MB in float32.
MAX_BLOCK_ELEMENTS = 2**25
_NORM_NAMES = ("final_layer_norm", "ln_f", "norm", "final_norm")


class LogitEffects(NamedTuple):
    """For each latent the `k` tokens that it raises most (highest first) and lowers most (lowest first)."""

    promoted: Int[Tensor, "latents k"]
    promoted_effect: Float[Tensor, "latents k"]
    suppressed: Int[Tensor, "latents k"]
    suppressed_effect: Float[Tensor, "latents k"]
    std: Float[Tensor, " latents"]  # of the effects over the vocabulary: what a single effect stands out from
    kurtosis: Float[Tensor, " latents"]  # fourth standardised moment (3 for a normal): high where few tokens stand out


def logit_effects(
    sae: SAE, model: LanguageModel, *, k: int = 10, latents: Int[Tensor, " latents"] | None = None
) -> LogitEffects:
    """Promoted and suppressed tokens of all latents (or of those given), on the CPU, in blocks of latents.

    Rows of the unembedding that belong to no token (padding of the vocabulary) are left out.

    Raises:
        MechintError: k below 1 or above the vocabulary, a hook that does not lie in the residual stream (another
            width), a model whose final norm is not known, a latent out of range.
    """
    weight, gain, centred = output_weights(model)
    n_tokens = len(weight)
    if not 1 <= k <= n_tokens:
        raise MechintError(f"k must be between 1 and the {n_tokens} tokens of {model.name}, got {k}")
    if sae.hook_out is not None and not in_residual(sae.hook_out):
        raise MechintError(
            f"{sae.hook_out} is not added to the residual stream, so its latents act on no output directly"
        )
    if sae.d_out != weight.shape[1]:
        dimension = "d_out" if sae.is_transcoder else "d_in"
        raise MechintError(
            f"the SAE has {dimension} {sae.d_out}, the residual stream of {model.name} is {weight.shape[1]} wide: only"
            " an SAE on the residual stream acts on the output directly"
        )
    rows = sae.W_dec.detach()
    if latents is not None:
        if len(latents) and not 0 <= int(latents.min()) <= int(latents.max()) < sae.d_sae:
            raise MechintError(f"latents must lie between 0 and {sae.d_sae - 1}")
        rows = rows[latents.to(rows.device)]
    directions = rows.to(weight.device, torch.float32)
    if centred:
        directions = directions - directions.mean(dim=1, keepdim=True)
    directions = directions * gain
    # the mean over the vocabulary is itself a product: with the mean row of the unembedding
    centre = weight.mean(dim=0)
    found: list[tuple[Tensor, ...]] = []
    with torch.inference_mode():
        for block in directions.split(max(1, MAX_BLOCK_ELEMENTS // n_tokens)):
            effects = block @ weight.T
            effects -= (block @ centre)[:, None]
            high, low = effects.topk(k, dim=1), effects.topk(k, dim=1, largest=False)
            square = effects.square_()
            variance = square.mean(dim=1)
            fourth = square.square_().mean(dim=1)
            kurtosis = fourth / variance.square().clamp_min(1e-30)
            found.append((high.indices, high.values, low.indices, low.values, variance.sqrt(), kurtosis))
    if not found:
        nothing, none = torch.zeros(0, k), torch.zeros(0, k, dtype=torch.int64)
        return LogitEffects(none, nothing, none, nothing, torch.zeros(0), torch.zeros(0))
    return LogitEffects(*(torch.cat(parts).cpu().clone() for parts in zip(*found, strict=True)))


def output_weights(model: LanguageModel) -> tuple[Float[Tensor, "d_vocab d_model"], Float[Tensor, " d_model"], bool]:
    """Unembedding (real tokens only), gain of the final norm, and whether that norm takes the mean off first.

    Raises:
        MechintError: the model has no unembedding, or its final norm is not where such models have it.
    """
    hf_model: Any = model.hf_model
    head = hf_model.get_output_embeddings()
    if head is None:
        raise MechintError(f"{model.name} has no output embedding, so latents have no direct effect on its tokens")
    base = hf_model.base_model
    norm = next((getattr(base, name) for name in _NORM_NAMES if hasattr(base, name)), None)
    weight = getattr(norm, "weight", None)
    if norm is None or weight is None:
        raise MechintError(f"the final norm of {type(hf_model).__name__} is not among {', '.join(_NORM_NAMES)}")
    n_tokens = min(len(head.weight), len(model.tokenizer))
    gain = weight.detach().float()
    if "gemma" in type(norm).__name__.lower():  # its norms multiply by 1 + weight
        gain = 1 + gain
    centred = "rms" not in type(norm).__name__.lower()
    return head.weight.detach()[:n_tokens].float(), gain, centred
