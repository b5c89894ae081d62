"""Other things to do to latents than to remove one: a value `Edit`, what it does to predictions, and to a continuation.

An edit gives the latents it names new activations f' in place of f = encode(x), and changes the activation by

    x' = x + sum_i (f'_i - f_i) * W_dec[i],

at the positions that the SAE may touch (`Text.seen`). A transcoder's f is of what it reads, and x is what stands at the
hook that it replaces. What the SAE does not reconstruct stays in x', so an edit that changes no activation changes
nothing. The model runs in full and exactly, whatever its architecture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechint.ablation.engines import following, padded
from mechint.ablation.kl import effect_of_log_probs
from mechint.errors import MechintError
from mechint.eval import Text
from mechint.inside import reads_of, written_hook
from mechint.models import LanguageModel
from mechint.models.generate import generate
from mechint.sae import SAE

# Numbers in a batch's logits; two such blocks exist at a time.
MAX_LOGITS = 2**24


@dataclass(frozen=True)
class Edit:
    """New activations for `latents`, all at once. Make one with `remove`, `scale`, `set_to`, `mean_of`, `resample_of`.

    - "scale": f' = amounts * f (0 removes; above 1 boosts where the latent fires anyway);
    - "set": f' = amounts at every touched position, where the latent fires and where it does not;
    - "resample": f' is a row of `pool`, another one (seeded) at each position: the latents of a row stay together.
    """

    latents: tuple[int, ...]
    kind: Literal["scale", "set", "resample"]
    amounts: tuple[float, ...] = ()
    pool: Float[Tensor, "row latent"] | None = None
    seed: int = 0

    def check(self, d_sae: int) -> None:
        """Raise `MechintError` unless the latents are the SAE's and everything has their number."""
        if not self.latents:
            raise MechintError("an edit needs at least one latent")
        if len(set(self.latents)) < len(self.latents):
            raise MechintError(f"an edit names a latent twice: {list(self.latents)}")
        for latent in self.latents:
            if not 0 <= latent < d_sae:
                raise MechintError(f"latent {latent} is out of range, the SAE has latents 0 to {d_sae - 1}")
        given = len(self.amounts) if self.pool is None else self.pool.shape[1]
        if given != len(self.latents):
            raise MechintError(f"an edit of {len(self.latents)} latents was given values for {given}")
        if self.pool is not None and len(self.pool) == 0:
            raise MechintError("nothing to resample from: the texts have no position that the SAE may touch")

    def new_acts(
        self, feature_acts: Float[Tensor, "text pos latent"], first_position: int = 0, first_text: int = 0
    ) -> Float[Tensor, "text pos latent"]:
        """f' from f of the edit's latents. `first_*` say where this block stands, for what resampling draws there."""
        if self.kind == "resample":
            assert self.pool is not None
            n_texts, n_pos, _ = feature_acts.shape
            rows = [
                torch.randint(
                    len(self.pool),
                    (first_position + n_pos,),
                    generator=torch.Generator().manual_seed(self.seed * 1_000_003 + first_text + text),
                )[first_position:]
                for text in range(n_texts)
            ]
            return self.pool.to(feature_acts)[torch.stack(rows).to(feature_acts.device)]
        amounts = torch.tensor(self.amounts, dtype=torch.float64).to(feature_acts)
        return feature_acts * amounts if self.kind == "scale" else amounts.expand_as(feature_acts)


def remove(latents: Sequence[int]) -> Edit:
    """Zero ablation of a set of latents together."""
    return scale(latents, 0.0)


def scale(latents: Sequence[int], factor: float) -> Edit:
    """Activations times `factor`: 0 removes, 2 doubles, -1 turns the contribution around."""
    return Edit(tuple(latents), "scale", (float(factor),) * len(latents))


def set_to(latents: Sequence[int], values: Sequence[float] | float) -> Edit:
    """Activations clamped, one value each or one for all."""
    amounts = [values] * len(latents) if isinstance(values, int | float) else list(values)
    return Edit(tuple(latents), "set", tuple(float(amount) for amount in amounts))


def mean_of(
    sae: SAE, model: LanguageModel, hook_name: str, texts: Sequence[Text], latents: Sequence[int], **kwargs: int
) -> Edit:
    """Mean ablation: activations set to their mean over the touched positions of `texts`, 0s included."""
    acts = acts_of(sae, model, hook_name, texts, latents, **kwargs)
    return set_to(latents, acts.double().mean(0).tolist() if len(acts) else 0.0)


def resample_of(
    sae: SAE,
    model: LanguageModel,
    hook_name: str,
    texts: Sequence[Text],
    latents: Sequence[int],
    *,
    seed: int = 0,
    **kwargs: int,
) -> Edit:
    """Resample ablation: activations taken from a random touched position of `texts`, drawn anew at each position."""
    pool = acts_of(sae, model, hook_name, texts, latents, **kwargs)
    edit = Edit(tuple(latents), "resample", pool=pool, seed=seed)
    edit.check(sae.d_sae)
    return edit


def acts_of(
    sae: SAE,
    model: LanguageModel,
    hook_name: str,
    texts: Sequence[Text],
    latents: Sequence[int],
    *,
    batch_size: int = 16,
) -> Float[Tensor, "row latent"]:
    """Activations of `latents` at every touched position of `texts`, in their order."""
    set_to(latents, 0.0).check(sae.d_sae)
    found = [torch.zeros(0, len(latents))]
    with torch.inference_mode():
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            tokens, _ = padded([text.tokens for text in batch])
            value = model.activations(tokens, hook_name)
            found.append(sae.encode(value.to(sae.W_enc))[..., list(latents)][seen_of(batch).to(value.device)].cpu())
    return torch.cat(found)


class Outcome(NamedTuple):
    """What an edit did to one text, position by position."""

    kl: Float[Tensor, " pos"]  # KL(clean || edited), nats
    ce_change: Float[Tensor, " pos"]  # of the text's own next token, nats; 0 at the last position
    logits_before: Float[Tensor, "pos chosen"]  # of the chosen tokens
    logits_after: Float[Tensor, "pos chosen"]


def intervene(
    sae: SAE,
    model: LanguageModel,
    hook_name: str,
    texts: Sequence[Text],
    edit: Edit,
    *,
    tokens: Sequence[int] = (),
    batch_size: int = 16,
) -> list[Outcome]:
    """Predictions of each text with and without `edit`, by two runs of the whole model.

    Args:
        tokens: token ids whose logits to keep, before and after; a difference of two of them needs no softmax.
        batch_size: most texts at once.

    Raises:
        MechintError: no text, latents or tokens out of range, predictions that are not finite.
    """
    edit.check(sae.d_sae)
    if not texts:
        raise MechintError("no texts: give at least one")
    for token in tokens:
        if not 0 <= token < model.d_vocab:
            raise MechintError(f"token {token} is out of range, {model.name} has 0 to {model.d_vocab - 1}")
    found: list[Outcome] = []
    hook_out, reads = written_hook(sae, hook_name), reads_of(sae, hook_name)
    with torch.inference_mode():
        while len(found) < len(texts):
            batch = _next(texts[len(found) :], batch_size, model.d_vocab)
            ids, lengths = padded([text.tokens for text in batch])
            before = model.logits(ids)
            change = as_hook(sae, edit, seen=seen_of(batch), first_text=len(found))
            after = model.logits_with(ids, hook_out, change, reads=reads)
            targets = following([text.tokens for text in batch], ids.shape[1])
            for row, length in enumerate(lengths):
                here = (row, slice(length))
                effect = effect_of_log_probs(before[here], after[here], targets[here])
                if not bool(torch.isfinite(torch.stack(effect)).all()):
                    raise MechintError(
                        f"the edit gives predictions of text {len(found) + 1} that are not finite: check the SAE and"
                        " the size of the edit"
                    )
                chosen = (logits[here][:, list(tokens)].cpu() for logits in (before, after))
                found.append(Outcome(effect.kl.clamp(min=0).cpu(), effect.ce_change.cpu(), *chosen))
    return found


def logit_difference(outcome: Outcome, tokens: Sequence[int], a: int, b: int, *, at: int = -1) -> tuple[float, float]:
    """logit(a) - logit(b) before and after, at a position; `tokens` are those that `intervene` was given."""
    for token in (a, b):
        if token not in tokens:
            raise MechintError(f"logits of token {token} were not kept: give it to intervene in tokens")
    first, second = list(tokens).index(a), list(tokens).index(b)
    before, after = (logits[at, first] - logits[at, second] for logits in (outcome.logits_before, outcome.logits_after))
    return float(before), float(after)


def continuation(
    sae: SAE,
    model: LanguageModel,
    hook_name: str,
    prompt: Text,
    edit: Edit,
    *,
    max_new_tokens: int = 20,
) -> tuple[list[int], list[int]]:
    """Greedy continuations of a prompt without and with `edit`, which acts on the prompt and on what is new.

    Both end before the tokenizer's end-of-text token, or at `max_new_tokens`. Raises `MechintError` as `generate` does.
    """
    edit.check(sae.d_sae)
    # `generate` edits from a first position on, and an SAE leaves out positions at the start (BOS) only.
    first = prompt.seen.index(True) if True in prompt.seen else len(prompt.tokens)
    if not all(prompt.seen[first:]):
        raise MechintError("a prompt may keep positions from the SAE at its start only")
    before, after = generate(
        model,
        prompt.tokens,
        max_new_tokens=max_new_tokens,
        hook_name=written_hook(sae, hook_name),
        reads=reads_of(sae, hook_name),
        edits=[None, as_hook(sae, edit, first_position=first)],
        first_position=first,
        use_cache=False,  # what resampling draws depends on the position, which a cached step does not see
    )
    return before, after


def as_hook(
    sae: SAE,
    edit: Edit,
    *,
    seen: Bool[Tensor, "text pos"] | None = None,
    first_position: int = 0,
    first_text: int = 0,
) -> Callable[..., Float[Tensor, "text pos d_out"]]:
    """The edit as a function of the hook's value (and of what a transcoder reads), for `LanguageModel.logits_with` and
    `edited`; `seen` None: all."""
    latents = list(edit.latents)

    def change(
        value: Float[Tensor, "text pos d_out"], read: Float[Tensor, "text pos d_in"] | None = None
    ) -> Float[Tensor, "text pos d_out"]:
        acts = sae.encode((value if read is None else read).to(sae.W_enc))[..., latents]
        difference = (edit.new_acts(acts, first_position, first_text) - acts) * sae.output_scale()
        if seen is not None:
            difference = difference * seen.to(difference)[..., None]
        return value + (difference @ sae.W_dec[latents]).to(value)

    return change


def seen_of(batch: Sequence[Text]) -> Bool[Tensor, "text pos"]:
    """Where the SAE may touch a padded batch."""
    mask = torch.zeros(len(batch), max(len(text.tokens) for text in batch), dtype=torch.bool)
    for row, text in enumerate(batch):
        mask[row, : len(text.seen)] = torch.tensor(text.seen, dtype=torch.bool)
    return mask


def _next(texts: Sequence[Text], batch_size: int, d_vocab: int) -> Sequence[Text]:
    """The next texts in order, as many as fit; at least one."""
    longest = 0
    for count, text in enumerate(texts[:batch_size]):
        longest = max(longest, len(text.tokens))
        if count > 0 and longest * (count + 1) * d_vocab > MAX_LOGITS:
            return texts[:count]
    return texts[:batch_size]
