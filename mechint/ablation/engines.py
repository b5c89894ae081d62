"""Two ways to the KL of removing latents from texts: a fast one for GPT-NeoX, and one for any model.

Removing latent i means v -> v - f_i * W_dec[i] at the hook, with f = encode(v) of the clean value, at all positions at
once. (A transcoder's f is of what it reads, and v is what stands at the hook that it replaces. f is in units of the
output: `written_acts`.) Where i does not fire the KL is exactly 0, and so it is at every position before its first
firing; neither is computed. Both engines open a block of texts, give its feature activations, and then the KL per
position of pairs.
"""

import copy
import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechint.ablation.kl import SAME_MODEL_KL, ChangedHead, Effect, effect_of_log_probs, float32_limit, kl_of_log_probs
from mechint.inside import Model, reads_of, written_acts, written_hook
from mechint.models.suffix import CleanPass, EntryPoint, NeoXSuffix, Span, entry_point, flat_positions
from mechint.sae import SAE

logger = logging.getLogger(__name__)

# Error of a position's KL that float32 is trusted with. Half of what is promised (1e-6): the logits' error is measured
# on the clean pass, and a changed pass may have a somewhat larger one.
TOLERANCE = 5e-7
# Bounds of memory, in numbers: clean distributions of a block, its feature activations, logits of the general way.
MAX_PROBS = 2**26
MAX_ACTS = 2**26
MAX_LOGITS = 2**24
# Positions of a block, and rows (pair x position) in flight.
MAX_POSITIONS = 4096
MAX_ROWS = 8192


class Pair(NamedTuple):
    """Latents removed together (one, in a ranking) from a text of the open block; the first fires at `start`."""

    text: int
    latents: tuple[int, ...]
    start: int


class Edited(NamedTuple):
    """Residual streams with latents removed, and which rows that changed."""

    rows: Float[Tensor, "rows d_model"]
    changed: Bool[Tensor, " rows"]


class NeoXEngine:
    """GPT-NeoX: from the hook on, from the first firing on, many pairs at once; see `mechint.models.suffix`.

    KLs are float64 on the CPU, 0 before a pair's start and at padding (as in `GeneralEngine`). They come from float32
    arithmetic where that is precise enough, and the caller asks again in float64 for the `doubtful` ones.
    """

    def __init__(self, sae: SAE, hf_model: Any, entry: EntryPoint, *, centred: bool):
        self.sae, self.hf_model, self.entry, self.centred = sae, hf_model, entry, centred
        self.suffix = NeoXSuffix(hf_model, entry)
        device = self.suffix.device
        # Apple's GPUs have no float64: there the reference runs on the processor.
        self.precise_device = torch.device("cpu") if device.type == "mps" else device
        self.precise_suffix = NeoXSuffix(hf_model, entry, dtype=torch.float64, device=self.precise_device)
        self.unembedding = ChangedHead(self.suffix.head_weight.to(device), self.suffix.head_bias)
        self.limit = 0.0

    @functools.cached_property
    def precise_sae(self) -> SAE:
        return copy.deepcopy(self.sae).to(device=self.precise_device, dtype=torch.float64)

    def positions_at_once(self) -> int:
        """Padded positions that a block may have."""
        return max(1, min(MAX_POSITIONS, MAX_PROBS // self.unembedding.weight.shape[0], MAX_ACTS // self.sae.d_sae))

    def open(
        self, token_lists: Sequence[list[int]], seen: Sequence[Sequence[bool]] | None = None
    ) -> Float[Tensor, "text pos d_sae"]:
        """Run texts unchanged, in float32 and float64; their feature activations, 0 at padding.

        Where `seen` of a text is False, its latents count as not firing, so nothing is removed there; all True if not
        given.
        """
        tokens, self.lengths = padded(token_lists)
        self.seen = seen_mask(tokens, self.lengths, seen)
        self.targets = following(token_lists, tokens.shape[1])
        self.clean = self.suffix.clean(tokens, self.lengths)
        self.precise = self.precise_suffix.clean(tokens, self.lengths)
        flat = self.precise.final.flatten(0, 1)
        self.predictions = self.unembedding.clean(flat)
        error = (self.clean.final.flatten(0, 1).to(flat) - flat).to(self.predictions.mean_unembed)
        self.limit = float32_limit(self.unembedding.logit_error(error, self.predictions), TOLERANCE)
        self.acts = self._encode(self.sae, self.clean)
        self.acts.mul_(self.seen.to(self.acts)[..., None])
        self.precise_acts: dict[int, Tensor] = {}
        return self.acts

    def batches(self, pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
        """Pairs in batches of at most `size` that stay within the bounds of memory."""
        found: list[list[Pair]] = []
        rows = 0
        for pair in sorted(pairs, key=lambda pair: (pair.text, pair.start)):
            length = self.lengths[pair.text] - pair.start
            if not found or len(found[-1]) == size or rows + length > MAX_ROWS:
                found.append([])
                rows = 0
            found[-1].append(pair)
            rows += length
        return found

    def effect(self, pairs: Sequence[Pair]) -> Effect:
        """KL(clean || ablated) and change of cross-entropy, each `[pair, pos]`, of one of the `batches`, in float32."""
        spans = spans_of(pairs)
        edited = self._edited(pairs, spans, self.clean, lambda text: self.acts[text], self.sae.W_dec)
        final = self.suffix.run(edited.rows, spans, self.clean, edited.changed)
        where = flat_positions(spans, self.clean).to(final.device)
        change = final - self.clean.final.flatten(0, 1)[where]
        target = self.targets.flatten()[where.cpu()]
        return self._per_pair(self.unembedding.effect(change, self.predictions, where, target), spans, len(pairs))

    def doubtful(self, kl: Float[Tensor, "pair pos"]) -> list[int]:
        """Rows of `kl` that may be off by more than `TOLERANCE` at some position, or are not finite."""
        # nan compares as false, so this also finds what is not finite.
        return torch.nonzero(~(kl.amax(1) <= self.limit)).flatten().tolist()

    def precise_effect(self, pairs: Sequence[Pair]) -> Effect:
        """As `effect`, with everything from the embedding on in float64."""
        spans = spans_of(pairs)
        edited = self._edited(pairs, spans, self.precise, self._precise_acts, self.precise_sae.W_dec)
        final = self.precise_suffix.run(edited.rows, spans, self.precise, edited.changed)
        where = flat_positions(spans, self.precise).to(final.device)
        clean = self.precise.final.flatten(0, 1)
        target = self.targets.flatten()[where.cpu()]
        return self._per_pair(self.unembedding.precise_effect(clean, final, where, target), spans, len(pairs))

    def _encode(self, sae: SAE, clean: CleanPass, text: int | None = None) -> Tensor:
        hooked = clean.hooked if text is None else clean.hooked[text]
        return written_acts(sae, hooked - hooked.mean(-1, keepdim=True) if self.centred else hooked)

    def _precise_acts(self, text: int) -> Tensor:
        if text not in self.precise_acts:
            acts = self._encode(self.precise_sae, self.precise, text)
            self.precise_acts[text] = acts.mul_(self.seen[text].to(acts)[:, None])
        return self.precise_acts[text]

    def _edited(self, pairs: Sequence[Pair], spans: list[Span], clean: CleanPass, acts: Any, W_dec: Tensor) -> "Edited":
        """The residual streams entering the suffix, with the pairs' latents removed.

        The same for centred and raw processing: a constant on all of d_model is removed by every later LayerNorm.
        """
        rows, changed = [], []
        begin = 0
        for span in spans:
            latents = torch.tensor([pair.latents for pair in pairs[begin : begin + span.n]], device=W_dec.device)
            here = slice(span.start, self.lengths[span.text])
            feature_acts = acts(span.text)[here][:, latents]
            removed = torch.einsum("pnk,nkd->npd", feature_acts, W_dec[latents])
            rows.append((clean.resid[span.text, here] - removed).flatten(0, 1))
            changed.append((feature_acts != 0).any(-1).T.flatten())
            begin += span.n
        return Edited(torch.cat(rows), torch.cat(changed))

    def _per_pair(self, effect: Effect, spans: list[Span], n_pairs: int) -> Effect:
        rows = torch.stack(effect).cpu()
        result = torch.zeros(2, n_pairs, self.clean.resid.shape[1], dtype=torch.float64)
        pair = row = 0
        for span in spans:
            length = self.lengths[span.text] - span.start
            values = rows[:, row : row + span.n * length].view(2, span.n, length)
            result[:, pair : pair + span.n, span.start : span.start + length] = values
            pair, row = pair + span.n, row + span.n * length
        return Effect(*result)


class GeneralEngine:
    """Any model and hook: whole texts through the whole model, many pairs at once.

    The logits are the model's own, in its precision, so a KL carries their rounding: for float32 logits with an error
    of `e`, about `e * sqrt(2 KL) + e**2 / 2`. There is nothing more precise to fall back on.
    """

    def __init__(self, sae: SAE, model: Model, hook_name: str):
        self.sae, self.model, self.hook_name = sae, model, hook_name
        self.hook_out = written_hook(sae, hook_name)

    def positions_at_once(self) -> int:
        return max(1, min(MAX_POSITIONS, MAX_PROBS // self.model.d_vocab, MAX_ACTS // self.sae.d_sae))

    def open(
        self, token_lists: Sequence[list[int]], seen: Sequence[Sequence[bool]] | None = None
    ) -> Float[Tensor, "text pos d_sae"]:
        self.tokens, self.lengths = padded(token_lists)
        self.targets = following(token_lists, self.tokens.shape[1])
        self.logits = self.model.logits(self.tokens)
        acts = written_acts(self.sae, self.model.activations(self.tokens, self.hook_name).float())
        self.acts = acts * seen_mask(self.tokens, self.lengths, seen).to(acts)[..., None]
        return self.acts

    def batches(self, pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
        size = max(1, min(size, MAX_LOGITS // (self.tokens.shape[1] * self.model.d_vocab)))
        ordered = sorted(pairs, key=lambda pair: (pair.text, pair.start))
        return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]

    def effect(self, pairs: Sequence[Pair]) -> Effect:
        n_pos = max(self.lengths[pair.text] for pair in pairs)
        texts = torch.tensor([pair.text for pair in pairs])
        latents = torch.tensor([pair.latents for pair in pairs], device=self.acts.device)
        feature_acts = torch.stack([self.acts[pair.text, :n_pos, list(pair.latents)] for pair in pairs])
        removed = torch.einsum("npk,nkd->npd", feature_acts, self.sae.W_dec[latents])
        changed = self.model.logits_with(
            self.tokens[texts, :n_pos], self.hook_out, lambda value: value - removed.to(value)
        )
        result = torch.zeros(2, len(pairs), self.tokens.shape[1], dtype=torch.float64)
        for row, pair in enumerate(pairs):
            here = slice(pair.start, self.lengths[pair.text])
            effect = effect_of_log_probs(
                self.logits[pair.text, here], changed[row, here], self.targets[pair.text, here]
            )
            result[:, row, here] = torch.stack(effect).cpu()
        return Effect(*result)

    def doubtful(self, kl: Float[Tensor, "pair pos"]) -> list[int]:
        return []

    def precise_effect(self, pairs: Sequence[Pair]) -> Effect:
        return self.effect(pairs)


Engine = NeoXEngine | GeneralEngine


def make_engine(sae: SAE, model: Model, hook_name: str, sample: list[int]) -> Engine:
    """The fast engine where it is proved to be this model by running `sample` through both, else the general one.

    `hook_name` is what the SAE reads.
    """
    device = next(model.hf_model.parameters()).device
    if sae.W_dec.device != device:
        sae = copy.deepcopy(sae).to(device)
    found: EntryPoint | str = "a transcoder replaces another hook than it reads"
    if reads_of(sae, hook_name) is None:
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


def padded(token_lists: Sequence[list[int]]) -> tuple[Tensor, list[int]]:
    """Texts padded on the right with token 0 to one length, and their lengths."""
    lengths = [len(tokens) for tokens in token_lists]
    rows = [tokens + [0] * (max(lengths) - len(tokens)) for tokens in token_lists]
    return torch.tensor(rows, dtype=torch.int64), lengths


def seen_mask(tokens: Tensor, lengths: list[int], seen: Sequence[Sequence[bool]] | None) -> Bool[Tensor, "text pos"]:
    """Positions where latents may be removed: of the texts, not of their padding, and where `seen` says so."""
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, :length] = True if seen is None else torch.tensor(seen[row], dtype=torch.bool)
    return mask


def following(token_lists: Sequence[list[int]], n_pos: int) -> Int[Tensor, "text pos"]:
    """The token after each position; -1 at the last one of a text and behind it."""
    targets = torch.full((len(token_lists), n_pos), -1, dtype=torch.int64)
    for row, tokens in enumerate(token_lists):
        targets[row, : len(tokens) - 1] = torch.tensor(tokens[1:], dtype=torch.int64)
    return targets


def spans_of(pairs: Sequence[Pair]) -> list[Span]:
    """Neighbouring pairs with the same text and start, as one span each."""
    spans: list[Span] = []
    for pair in pairs:
        if spans and spans[-1][:2] == (pair.text, pair.start):
            spans[-1] = spans[-1]._replace(n=spans[-1].n + 1)
        else:
            spans.append(Span(pair.text, pair.start, 1))
    return spans
