"""Texts with and without an edit, from one batch and one seed, with two numbers for each: how far the edit moves the
next prediction, and how odd the steered text is to the unsteered model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mechint.errors import MechintError
from mechint.models import Edit, LanguageModel, edit_rows, generate

Positions = Literal["all", "new"]
BASELINE = "baseline"


@dataclass(frozen=True)
class Steered:
    """One continuation of one prompt.

    Attributes:
        setting: the name of the edit; "baseline" for none.
        text: the new text, without the prompt.
        next_kl: KL(baseline || edited) of the first new token's distribution, in nats; 0 for the baseline.
        nll: mean of -log p of the new tokens under the model *without* the edit, in nats a token; None without tokens.
            Far above the baseline's, the edit has broken the text rather than turned it.
    """

    prompt: str
    setting: str
    text: str
    tokens: tuple[int, ...]
    next_kl: float
    nll: float | None


def first_position(positions: Positions, n_prompt: int, *, prepend_bos: bool) -> int:
    """Where an edit begins: after BOS ("all"), or at the prompt's last token, which predicts the first new one."""
    return int(prepend_bos) if positions == "all" else n_prompt - 1


def next_log_probs(
    model: LanguageModel,
    prompt: str,
    hook_name: str,
    edits: Sequence[Edit | None],
    *,
    reads: str | None = None,
    positions: Positions = "all",
    prepend_bos: bool = True,
) -> Float[Tensor, "n_edits d_vocab"]:
    """Log-probabilities of the token after the prompt, one row for each edit (None: the model as it is).

    Raises:
        MechintError: a prompt without tokens, an unknown hook.
    """
    model.check_hook(hook_name)
    (tokens,) = _tokenize(model, [prompt], prepend_bos)
    begin = first_position(positions, len(tokens), prepend_bos=prepend_bos)
    rows = torch.tensor([tokens] * len(edits))
    logits = model.logits_with(rows, hook_name, edit_rows(edits, begin), reads=reads)
    return logits[:, -1].float().log_softmax(-1).cpu()


def steer(
    model: LanguageModel,
    prompts: Sequence[str],
    hook_name: str,
    edits: Mapping[str, Edit],
    *,
    reads: str | None = None,
    positions: Positions = "all",
    prepend_bos: bool = True,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> list[list[Steered]]:
    """For each prompt the continuation without an edit, then one for each of the named edits, all with one seed.

    `hook_name` is edited; `reads` names an earlier hook whose value the edits are given too (a transcoder's latents).

    Raises:
        MechintError: no prompt, one without tokens, one too long for the model, an unknown hook, settings out of range.
    """
    if not prompts:
        raise MechintError("no prompts: give at least one")
    model.check_hook(hook_name)
    names = [BASELINE, *edits]
    changes: list[Edit | None] = [None, *edits.values()]
    found = []
    for prompt, tokens in zip(prompts, _tokenize(model, prompts, prepend_bos), strict=True):
        new = generate(
            model,
            tokens,
            max_new_tokens=max_new_tokens,
            hook_name=hook_name,
            reads=reads,
            edits=changes,
            first_position=first_position(positions, len(tokens), prepend_bos=prepend_bos),
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )
        log_probs = next_log_probs(
            model, prompt, hook_name, changes, reads=reads, positions=positions, prepend_bos=prepend_bos
        )
        kl = F.kl_div(log_probs.double(), log_probs[:1].double(), log_target=True, reduction="none").sum(-1)
        found.append(
            [
                Steered(prompt, name, model.tokenizer.decode(row), tuple(row), max(0.0, float(kl[i])), nll)
                for i, (name, row, nll) in enumerate(zip(names, new, _nll(model, tokens, new), strict=True))
            ]
        )
    return found


def _tokenize(model: LanguageModel, prompts: Sequence[str], prepend_bos: bool) -> list[list[int]]:
    rows = model.tokenize(prompts, prepend_bos=prepend_bos)
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise MechintError(f"the prompt {prompt[:40]!r} has no tokens: give a text, or prepend BOS")
    return rows


def _nll(model: LanguageModel, prompt: list[int], new: list[list[int]]) -> list[float | None]:
    """Mean -log p of each row's new tokens under the model as it is. Rows are padded on the right, which is inert."""
    longest = max(map(len, new))
    rows = torch.tensor([prompt + row + [0] * (longest - len(row)) for row in new])
    log_probs = model.logits(rows)[:, len(prompt) - 1 :].float().log_softmax(-1).cpu()
    means: list[float | None] = []
    for i, row in enumerate(new):
        chosen = log_probs[i, torch.arange(len(row)), torch.tensor(row, dtype=torch.int64)]
        means.append(-float(chosen.double().mean()) if row else None)
    return means
