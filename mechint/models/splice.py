"""A model that is run once up to a residual-stream hook and on, and again from the hook on with another value there.

What comes before the hook does not depend on the value, so a changed value costs the layers behind it only. Done for
every architecture that transformers runs by letting the blocks before the hook pass the new value on instead of
computing: masks, positions and everything else stay the model's own. `make_splice` proves on a short text that the
parts put together are the model, and says why not where they are not.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechint.config import layer_of_hook
from mechint.models.language_model import LanguageModel
from mechint.models.matmul import FastLinear, linear

# Largest relative difference between hidden states, and absolute one between log-probabilities, that rounding makes.
SAME_HIDDEN = 1e-3
SAME_LOG_PROBS = 1e-3
# Tokens of the text that the proof is made on.
PROOF_TOKENS = 32


class Splice:
    """`clean` runs a batch of texts, `rerun` the last batch again with another value at the hook.

    Both return what the unembedding reads (`final`: after the final norm). Make one with `make_splice`.
    """

    def __init__(self, model: LanguageModel, hook_name: str):
        layer = layer_of_hook(hook_name)
        assert layer is not None and "hook_resid_" in hook_name, hook_name
        self.model = model
        self.first = layer if hook_name.endswith("pre") else layer + 1  # the first block that reads the value
        self.base: nn.Module = model.hf_model.base_model
        head: Any = model.hf_model.get_output_embeddings()
        self.weight: Float[Tensor, "d_vocab d_model"] = head.weight.detach()
        self.bias: Float[Tensor, " d_vocab"] | None = None if head.bias is None else head.bias.detach()
        self._tokens: Tensor | None = None
        self._rest: tuple | None = None  # what a block returns beside the residual stream; None: nothing but it

    def clean(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "batch pos d_in"], Float[Tensor, "batch pos d_model"]]:
        """The hook's value, in the model's processing, and `final`. Remembers the batch for `rerun`."""
        found: list[Tensor] = []

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            self._rest = output[1:] if isinstance(output, tuple) else None

        if self.first == 0:
            handle = self.model.blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = self.model.blocks[self.first - 1].register_forward_hook(after)
        self._tokens = tokens.to(self.model.device)
        try:
            final = self._run(self._tokens)
        finally:
            handle.remove()
        value = found[0]
        if self.model.processing == "centred":
            value = value - value.mean(-1, keepdim=True)
        return value, final

    def rerun(self, value: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_model"]:
        """`final` of the last clean batch with `value` at the hook."""
        assert self._tokens is not None, "rerun before clean"
        with self._passing_on(value):
            return self._run(self._tokens)

    def _run(self, tokens: Tensor) -> Tensor:
        with torch.inference_mode(), FastLinear():
            return self.base(input_ids=tokens, use_cache=False).last_hidden_state

    @contextlib.contextmanager
    def _passing_on(self, value: Tensor) -> Iterator[None]:
        blocks = self.model.blocks
        if self.first == 0:

            def replace(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
                return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

            handle = blocks[0].register_forward_pre_hook(replace, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()
            return
        output = value if self._rest is None else (value, *self._rest)
        skipped = list(blocks)[: self.first]
        shadowed = [vars(block).get("forward") for block in skipped]  # accelerate's, of a model with a device map
        for block in skipped:
            block.forward = lambda *args, **kwargs: output  # shadows the class's method
        try:
            yield
        finally:
            for block, own in zip(skipped, shadowed, strict=True):
                del block.forward
                if own is not None:
                    block.forward = own


def make_splice(model: Any, hook_name: str, sample: list[int]) -> Splice | str:
    """A `Splice`, proved to be the model on the first tokens of `sample`, or a phrase that says why there is none."""
    if not isinstance(model, LanguageModel):
        return f"{type(model).__name__} is not a LanguageModel"
    if model.backend != "transformers":
        return "it runs through TransformerLens"
    if "hook_resid_" not in hook_name:
        return f"{hook_name} is not the residual stream itself"
    tokens = torch.tensor([sample[:PROOF_TOKENS]])
    try:
        splice = Splice(model, hook_name)
        value, final = splice.clean(tokens)
        again = splice.rerun(value)
        # another value than its own shows whether the value is read at all
        other = splice.rerun(value.flip(-1))
        expected = model.logits_with(tokens, hook_name, lambda hooked: hooked.flip(-1))
        with torch.inference_mode():
            mine = [linear(hidden[0], splice.weight, splice.bias) for hidden in (final, other)]
            pairs = zip((model.logits(tokens)[0], expected[0]), mine, strict=True)
            differences = [(a.float().log_softmax(-1) - b.float().log_softmax(-1)).abs().max() for a, b in pairs]
    except (AttributeError, KeyError, RuntimeError, TypeError, IndexError) as error:
        return f"its parts are not as expected ({type(error).__name__})"
    if float((again - final).norm()) > SAME_HIDDEN * float(final.norm()):
        return "running from the hook on gives other hidden states"
    if max(map(float, differences)) > SAME_LOG_PROBS:
        return "its predictions are not the unembedding of its last hidden state"
    return splice
