"""Continue a prompt, greedily or sampled, with an edit of the value at a hook.

Several settings of one prompt run as the rows of one batch, and all rows draw with the same random numbers, so what
differs between two rows differs because of their edits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.errors import MechintError
from mechint.models.language_model import LanguageModel

# From the hook's value `[batch, pos, d_out]` to what takes its place; acts on each position by itself. Where another
# hook is read, its value `[batch, pos, d_in]` is the second argument.
Edit = Callable[..., Tensor]


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 40,
    hook_name: str | None = None,
    reads: str | None = None,
    edits: Sequence[Edit | None] = (None,),
    first_position: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> list[list[int]]:
    """The new tokens after `prompt` (token ids, BOS included if the model is to see one), one list for each edit.

    A list ends before the tokenizer's end-of-text token or at `max_new_tokens`.

    Args:
        reads: an earlier hook, whose value edits are given too.
        edits: what to do at `hook_name`, one row each; None leaves the model as it is.
        first_position: positions before it keep their own value. `len(prompt) - 1` edits what the new tokens are
            predicted from and nothing earlier.
        temperature: 0 takes the likeliest token, otherwise tokens are drawn from softmax(logits / temperature).
        top_k: draw from the k likeliest only.
        seed: of the drawing. Equal seeds give equal texts on one machine.
        use_cache: keep keys and values of what was read instead of reading all again for each token. An edit acts on
            each position by itself, so both give the same up to rounding. The bridge backend always reads again.

    Raises:
        MechintError: an empty prompt, more tokens than the model reads, settings out of range.
    """
    _check(model, prompt, max_new_tokens, hook_name, edits, temperature, top_k)
    generator = torch.Generator().manual_seed(seed)
    end = model.tokenizer.eos_token_id
    tokens = torch.tensor([list(prompt)] * len(edits), device=model.device)
    n_prompt = len(prompt)
    step = _cached_step if use_cache and model.backend == "transformers" else _plain_step
    state: dict[str, Any] = {}
    ended = torch.zeros(len(edits), dtype=torch.bool, device=tokens.device)
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            logits = step(model, tokens, hook_name, reads, edits, first_position, state)
            uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
            chosen = choose(logits, temperature=temperature, top_k=top_k, uniform=uniform)
            tokens = torch.cat((tokens, chosen[:, None]), dim=1)
            if end is not None:
                ended |= chosen == end
                if bool(ended.all()):
                    break
    rows = [row[n_prompt:] for row in tokens.tolist()]
    return [row[: row.index(end)] if end in row else row for row in rows]


def choose(logits: Float[Tensor, "batch d_vocab"], *, temperature: float, top_k: int | None, uniform: float) -> Tensor:
    """The next token of each row: the likeliest at temperature 0, else where the cumulated probability, in the order
    of token ids, passes `uniform` (in [0, 1), the same for all rows)."""
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.cpu().double() / temperature  # mps has no float64
    if top_k is not None and top_k < logits.shape[-1]:
        kth = scaled.topk(top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < kth, -math.inf)
    cumulated = scaled.softmax(-1).cumsum(-1)
    # relative to the total, which rounding may leave below 1; the first entry *above* u never has probability 0
    target = uniform * cumulated[:, -1:]
    found = torch.searchsorted(cumulated, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return found.to(logits.device)


def edit_rows(edits: Sequence[Edit | None], first_position: int, offset: int = 0) -> Edit:
    """One edit of a batch whose row i is edited by `edits[i]`, at positions from `first_position` on.

    `offset` is the position that the batch's first column stands for.
    """
    start = max(0, first_position - offset)

    def edit(value: Float[Tensor, "batch pos d_out"], *read: Tensor) -> Float[Tensor, "batch pos d_out"]:
        if start >= value.shape[1]:
            return value
        rows = []
        for index, change in enumerate(edits):
            own = [tensor[index : index + 1] for tensor in (value, *read)]
            row = own[0]
            if change is not None:
                row = torch.cat((row[:, :start], change(*(tensor[:, start:] for tensor in own))), dim=1)
            rows.append(row)
        return torch.cat(rows)

    return edit


def _plain_step(
    model: LanguageModel,
    tokens: Tensor,
    hook_name: str | None,
    reads: str | None,
    edits: Sequence[Edit | None],
    first_position: int,
    state: dict[str, Any],
) -> Tensor:
    """Logits after the last token, from all tokens."""
    if hook_name is None:
        return model.logits(tokens)[:, -1]
    return model.logits_with(tokens, hook_name, edit_rows(edits, first_position), reads=reads)[:, -1]


def _cached_step(
    model: LanguageModel,
    tokens: Tensor,
    hook_name: str | None,
    reads: str | None,
    edits: Sequence[Edit | None],
    first_position: int,
    state: dict[str, Any],
) -> Tensor:
    """Logits after the last token, from the tokens that `state` has not read yet."""
    read = state.get("read", 0)
    inputs = {"input_ids": tokens[:, read:], "past_key_values": state.get("cache"), "use_cache": True}
    if hook_name is None:
        out = model.hf_model(**inputs)
    else:
        with model.edited(hook_name, edit_rows(edits, first_position, read), reads=reads):
            out = model.hf_model(**inputs)
    state.update(read=tokens.shape[1], cache=out.past_key_values)
    return out.logits[:, -1]


def _check(
    model: LanguageModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    hook_name: str | None,
    edits: Sequence[Edit | None],
    temperature: float,
    top_k: int | None,
) -> None:
    if not prompt:
        raise MechintError("the prompt has no tokens: give a text, or prepend BOS")
    if max_new_tokens < 1:
        raise MechintError(f"--max-new-tokens must be at least 1, got {max_new_tokens}")
    if len(prompt) + max_new_tokens > model.n_ctx:
        raise MechintError(
            f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones are more than the {model.n_ctx} that"
            f" {model.name} reads: shorten the prompt or lower --max-new-tokens"
        )
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise MechintError(f"--temperature must be 0 or a positive number, got {temperature}")
    if top_k is not None and top_k < 1:
        raise MechintError(f"--top-k must be at least 1, got {top_k}")
    assert edits, "at least one row; None is the model as it is"
    if hook_name is not None:
        model.check_hook(hook_name)
    else:
        assert not any(edits), "an edit needs a hook"
