"""What an ablation is done on: a model, a hook and how texts become tokens, checked against the SAE before any work."""

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.ablation.engines import Engine, GeneralEngine, NeoXEngine
from mechint.ablation.kl import kl_of_log_probs
from mechint.errors import MechintError, nearest
from mechint.models import LanguageModel
from mechint.models.bridge import is_bridge
from mechint.models.suffix import NeoXSuffix, entry_point
from mechint.sae import SAE
from mechint.subject import check_processing

logger = logging.getLogger(__name__)

# KL of the model's own predictions to the written-out layers' up to which the two count as the same: rounding gives
# about 1e-9, another activation function or folded weights give 1e-3 and more.
SAME_MODEL_KL = 1e-6


class BridgedModel:
    """A `TransformerBridge` that the caller made, behind the methods of `LanguageModel` that ablation uses."""

    def __init__(self, bridge: Any):
        self.bridge = bridge
        self.hf_model = bridge.original_model
        self.tokenizer = bridge.tokenizer
        self.name: str = bridge.cfg.model_name
        self.d_vocab: int = bridge.cfg.d_vocab
        self.n_ctx: int = bridge.cfg.n_ctx
        self.device = next(bridge.parameters()).device
        self.processing: str | None = None  # not recorded by TransformerLens

    def check_hook(self, hook_name: str) -> None:
        if hook_name not in self.bridge.hook_dict:
            names = sorted(name for name in self.bridge.hook_dict if "original" not in name)
            raise MechintError(f"{self.name} has no hook {hook_name!r}; {nearest(hook_name, names)}")

    def tokenize(self, texts: Sequence[str], *, prepend_bos: bool, context_size: int | None = None) -> list[list[int]]:
        limit = min(context_size or self.n_ctx, self.n_ctx)
        rows = [self.bridge.to_tokens(text, prepend_bos=prepend_bos)[0].tolist() for text in texts]
        return [row[:limit] for row in rows]

    def logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        return self.bridge(tokens.to(self.device), return_type="logits")

    def activations(self, tokens: Int[Tensor, "batch pos"], hook_name: str) -> Float[Tensor, "batch pos d_in"]:
        _, cache = self.bridge.run_with_cache(
            tokens.to(self.device), names_filter=lambda name: name == hook_name, return_type=None
        )
        return cache[hook_name]

    def logits_with(
        self, tokens: Int[Tensor, "batch pos"], hook_name: str, edit: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        hooks = [(hook_name, lambda value, hook: edit(value))]
        return self.bridge.run_with_hooks(tokens.to(self.device), fwd_hooks=hooks, return_type="logits")


Model = LanguageModel | BridgedModel


def as_model(model: Any) -> Model:
    """A `LanguageModel` as it is, a `TransformerBridge` behind the same methods; anything else is an error."""
    if isinstance(model, LanguageModel | BridgedModel):
        return model
    if is_bridge(model):
        return BridgedModel(model)
    raise MechintError(
        f"model should be a LanguageModel (mechint.models.load_model) or a TransformerBridge, got"
        f" {type(model).__name__}"
    )


def check_fit(sae: SAE, model: Model, hook_name: str) -> None:
    """Raise `MechintError` unless the SAE was trained on this hook, in this processing, and has its width."""
    model.check_hook(hook_name)
    trained_on = sae.metadata.get("hook_name")
    if trained_on is not None and trained_on != hook_name:
        raise MechintError(f"the SAE was trained on {trained_on}, but is to be used at {hook_name}")
    probe = torch.zeros(1, 2, dtype=torch.int64)
    with torch.inference_mode():
        hooked = model.activations(probe, hook_name)
    if hooked.ndim != 3 or hooked.shape[-1] != sae.d_in:
        raise MechintError(
            f"the SAE has d_in {sae.d_in}, but {hook_name} of {model.name} is {hooked.shape[-1]} wide: give the model"
            " that the SAE was trained on"
        )
    processing = model.processing
    if processing is None and hook_name.rpartition(".")[2].startswith("hook_resid"):
        # A residual stream whose mean is rounding error has been centred.
        centred = hooked.float().mean(-1).abs().max() < 1e-4 * hooked.float().pow(2).mean().sqrt()
        processing = "centred" if centred else "raw"
    check_processing(sae, processing, model.name)


def make_engine(sae: SAE, model: Model, hook_name: str, sample: list[int]) -> Engine:
    """The fast engine where it is proved to be this model by running `sample` through both, else the general one."""
    device = next(model.hf_model.parameters()).device
    if sae.W_dec.device != device:
        sae = copy.deepcopy(sae).to(device)
    found = entry_point(model.hf_model, hook_name)
    reason = found
    if not isinstance(found, str):
        tokens = torch.tensor([sample])
        try:
            suffix = NeoXSuffix(model.hf_model, found)
            final = suffix.clean(tokens, [len(sample)]).final[0]
            logits = final @ suffix.head_weight.to(final).T
            own = logits if suffix.head_bias is None else logits + suffix.head_bias.to(final)
            difference = float(kl_of_log_probs(model.logits(tokens)[0], own).abs().max())
        except (AttributeError, RuntimeError) as error:
            reason = f"its layers are not as expected ({type(error).__name__})"
        else:
            if difference < SAME_MODEL_KL:
                return NeoXEngine(sae, model.hf_model, found, centred=model.processing == "centred")
            reason = "its predictions are not those of its plain weights (folded, adapted or lower precision)"
    logger.warning("%s: whole sequences through the whole model, which is slower, because %s", model.name, reason)
    return GeneralEngine(sae, model, hook_name)
