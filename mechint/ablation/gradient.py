"""A language model cut at a hook, so that everything behind it can be differentiated by what the hook holds."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mechint.ablation.kl import SAME_MODEL_KL, kl_of_log_probs
from mechint.models import LanguageModel
from mechint.models.matmul import linear

# Positions of a batch, and numbers in its logits where the model makes all of them at once.
MAX_POSITIONS = 4096
MAX_LOGITS = 2**24
# Tokens of the sample that the way is proved on.
PROOF_TOKENS = 32


class Way(NamedTuple):
    """How the model is run from tokens to what is differentiated, and how that becomes logits.

    `weight` None: `final` is the logits themselves. Else logits are `final @ weight.T + bias`, and neither they nor
    their gradient is ever whole in memory.
    """

    run: Callable[[Int[Tensor, "text pos"]], tuple[Tensor, Tensor]]  # -> value at the hook (a leaf), final
    weight: Float[Tensor, "d_vocab d_model"] | None
    bias: Float[Tensor, " d_vocab"] | None
    weight_t: Float[Tensor, "d_model d_vocab"] | None = None  # contiguous, for the products backwards

    def logits_at_once(self, model: LanguageModel) -> int:
        """Positions that a batch may have because of its logits."""
        return MAX_POSITIONS if self.weight is not None else max(1, MAX_LOGITS // model.d_vocab)

    def probs(self, final: Float[Tensor, "rows _"]) -> Float[Tensor, "rows d_vocab"]:
        logits = final if self.weight is None else linear(final, self.weight)
        # in float32 whatever the model's precision: what is drawn goes by sums over the vocabulary
        return torch.softmax((logits if self.bias is None else logits + self.bias).float(), dim=-1)

    def back(self, of_logits: Float[Tensor, "rows d_vocab"]) -> Float[Tensor, "rows _"]:
        """A gradient of the logits as one of `final`."""
        return of_logits if self.weight_t is None else linear(of_logits.to(self.weight_t), self.weight_t)

    def row(self, tokens: Int[Tensor, " rows"], like: Tensor) -> Float[Tensor, "rows _"]:
        """`back` of one-hot rows."""
        if self.weight is not None:
            return self.weight[tokens].to(like)
        return torch.zeros_like(like).scatter_(1, tokens[:, None], 1.0)


def find_way(model: LanguageModel, hook_name: str, sample: list[int]) -> Way:
    """Up to the last hidden state where its product with the unembedding is proved, on `sample`, to be the logits."""
    model.check_hook(hook_name)
    fast = FastLinearBothWays()

    def differentiable(end: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def run(tokens: Int[Tensor, "text pos"]) -> tuple[Tensor, Tensor]:
            found: list[Tensor] = []

            def cut(value: Tensor) -> Tensor:
                # What comes before the hook has no graph: parameters take no gradient, and here a new leaf begins.
                found.append(value.detach().clone().requires_grad_())
                return found[0]

            edited = model.edited(hook_name, cut)
            with torch.inference_mode(False), torch.enable_grad(), edited, fast:
                final = end(tokens.to(model.device))
            return found[0], final

        return run

    if model.backend == "bridge":
        return Way(differentiable(lambda tokens: model.bridge(tokens, return_type="logits")), None, None)
    hf: Any = model.hf_model
    head: Any = hf.get_output_embeddings()
    run = differentiable(lambda tokens: hf.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    weight = head.weight.detach()
    way = Way(run, weight, None if head.bias is None else head.bias.detach(), weight.t().contiguous())
    tokens = torch.tensor([sample[:PROOF_TOKENS]])
    with torch.inference_mode():
        final = run(tokens)[1].detach()[0]
        own = linear(final, head.weight) if head.bias is None else linear(final, head.weight, head.bias)
        if float(kl_of_log_probs(model.logits(tokens)[0], own).abs().max()) < SAME_MODEL_KL:
            return way
    return Way(differentiable(lambda tokens: hf(input_ids=tokens, use_cache=False).logits), None, None)


class FastLinearBothWays(TorchFunctionMode):
    """Within the block, linear layers whose weights take no gradient run by `mechint.models.matmul.linear`, and so does
    their way back. Remembers a transposed copy of each weight that was needed backwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}  # by the weight's id, which holding the weight keeps its own

    def transposed(self, weight: Tensor) -> Tensor:
        if id(weight) not in self.copies:
            self.copies[id(weight)] = (weight, weight.detach().t().contiguous())
        return self.copies[id(weight)][1]

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and args[0].ndim >= 2:
            x, weight, bias = (*args, None)[:3]
            if not any(tensor is not None and tensor.requires_grad for tensor in (weight, bias)):
                return _Linear.apply(x, weight, bias, self)
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias, differentiable in x alone. Both ways run without autograd, so that `linear` may be fast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mode: FastLinearBothWays) -> Tensor:
        ctx.weight, ctx.mode = weight, mode
        return linear(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        with torch.no_grad():
            back = linear(gradient.flatten(0, -2).contiguous(), ctx.mode.transposed(ctx.weight))
        return back.unflatten(0, gradient.shape[:-1]), None, None, None
