"""What removing each latent would do to the predictions, estimated for all latents from one forward pass a text.

Latent i adds f_i(p) * W_dec[i] to the activation x(p) at position p (a transcoder's latent, to what stands at the hook
that it replaces). To first order, taking it out of a text changes a
quantity Q of that text by

    a_i = - sum_p f_i(p) * (W_dec[i] . dQ/dx(p)),

and one backward pass of Q gives dQ/dx at all positions, so a_i of every latent costs one product with W_dec. The sum
runs over the positions that the SAE may touch (`Text.seen`). Three Qs are used:

- the text's mean next-token cross-entropy, in nats a token: a_i estimates its change;
- logits of chosen tokens (`LogitTarget`);
- KL(clean || latent removed) has gradient 0 at the clean text, so its first order is empty. Its second order is
  1/2 sum_t d' F_t d with d the change of x and F_t the Fisher information of the prediction at t. Draw a random
  direction v_t of the logits at each position, with mean 0 and F as its covariance (`_draw`), and let Q be the sum of
  v_t . logits_t: directions of different positions are independent, so the mean over draws of a_i ** 2 / 2 is the
  second-order KL summed over positions. Again one backward pass a draw serves all latents.

Estimates see nothing of what happens beyond a small change (`docs/ranking.md` says how far that carries).
"""

import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.ablation.engines import padded
from mechint.ablation.gradient import Way, find_way
from mechint.errors import MechintError
from mechint.eval import Text
from mechint.inside import reads_of, written_acts, written_hook
from mechint.models import LanguageModel
from mechint.models.matmul import full_float32, linear
from mechint.sae import SAE

# Numbers in a batch's feature activations: bounds the memory.
MAX_ACTS = 2**24
# Positions whose distribution over the vocabulary exists at a time.
ROWS = 256


@dataclass(frozen=True)
class LogitTarget:
    """Mean logit of `tokens` minus mean logit of `against` (if any) at position `at` of a text; -1 is its last."""

    tokens: tuple[int, ...]
    against: tuple[int, ...] = ()
    at: int = -1

    def check(self, d_vocab: int) -> None:
        """Raise `MechintError` unless the tokens are the model's."""
        if not self.tokens:
            raise MechintError("a logit target needs at least one token")
        for token in (*self.tokens, *self.against):
            if not 0 <= token < d_vocab:
                raise MechintError(f"logit target: token {token} is out of range, the model has 0 to {d_vocab - 1}")


@dataclass
class Attribution:
    """Sums over the texts done so far, one entry a latent, in float64. Two of different texts can be added.

    Attributes:
        signed: of a_i of the cross-entropy (or of the `LogitTarget`); above 0: removing the latent makes it larger.
        absolute: of abs(a_i).
        kl: of the estimated mean over positions of KL(clean || removed), in nats; 0 where nothing was drawn for it.
        kl_squares: of its squares, for a standard error over texts.
        n_active, n_active_texts: positions and texts where the latent fires.
    """

    signed: Float[Tensor, " d_sae"]
    absolute: Float[Tensor, " d_sae"]
    kl: Float[Tensor, " d_sae"]
    kl_squares: Float[Tensor, " d_sae"]
    n_active: Int[Tensor, " d_sae"]
    n_active_texts: Int[Tensor, " d_sae"]
    n_texts: int = 0
    n_tokens: int = 0

    @classmethod
    def zeros(cls, d_sae: int) -> "Attribution":
        def sums() -> Float[Tensor, " d_sae"]:
            return torch.zeros(d_sae, dtype=torch.float64)

        def counts() -> Int[Tensor, " d_sae"]:
            return torch.zeros(d_sae, dtype=torch.int64)

        return cls(sums(), sums(), sums(), sums(), counts(), counts())

    def __add__(self, other: "Attribution") -> "Attribution":
        sums: dict[str, Any] = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Attribution(**sums)


class Seeds(NamedTuple):
    """Gradients at the model's end, `[text, pos, _]`: of the quantity asked for, and one a draw of tokens."""

    quantity: Tensor
    draws: list[Tensor]


def attribute(
    sae: SAE,
    model: LanguageModel,
    hook_name: str,
    texts: Sequence[Text],
    *,
    target: LogitTarget | None = None,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> Attribution:
    """First-order effect of removing each latent, and second-order KL, summed over texts; see the module's docstring.

    Args:
        target: instead of the texts' cross-entropy.
        draws: of the model's own tokens for the KL, each a backward pass to the hook; 0 leaves it out. They
            depend on `seed` and the text alone.
        batch_size: most texts at once.

    Raises:
        MechintError: no text, a text without two tokens (for the cross-entropy), a target outside text or vocabulary,
            gradients that are not finite.
    """
    _check(texts, target, model.d_vocab, draws, batch_size)
    total = Attribution.zeros(sae.d_sae)
    with full_float32():
        way = find_way(model, written_hook(sae, hook_name), texts[0].tokens)
        batches = list(_batches(texts, batch_size, sae.d_sae, way.logits_at_once(model)))
        if progress:
            from tqdm import tqdm

            every = 0.1 if sys.stderr.isatty() else 60.0  # in a log file a line a minute will do
            n_tokens = sum(len(text.tokens) for text in texts)
            bar = tqdm(total=n_tokens, desc="attribution", unit=" tokens", mininterval=every)
        else:
            bar = None
        for batch in batches:
            tokens, lengths = padded([text.tokens for text in batch])
            value, final = way.run(tokens)
            with torch.inference_mode():
                seeds = _seeds(way, final.detach(), batch, target, draws, seed)
                acts = _acts_where_seen(sae, _read(sae, model, hook_name, tokens, value), batch)
            quantity, *squares = (
                _per_text(sae, acts, gradient) for gradient in _gradients(value, final, [seeds.quantity, *seeds.draws])
            )
            if not bool(torch.isfinite(quantity).all()):
                raise MechintError(
                    "the gradient of the predictions is not finite: check model and SAE with scripts/eval_sae.py"
                )
            n_pos = torch.tensor(lengths, dtype=torch.float64)[:, None]
            kl = torch.stack([part.square() / (2 * n_pos) for part in squares]).mean(0) if squares else None
            fires = acts != 0
            total += Attribution(
                quantity.sum(0),
                quantity.abs().sum(0),
                torch.zeros_like(total.kl) if kl is None else kl.sum(0),
                torch.zeros_like(total.kl) if kl is None else kl.square().sum(0),
                fires.sum((0, 1)).cpu(),
                fires.any(1).sum(0).cpu(),
                len(batch),
                sum(lengths),
            )
            if bar is not None:
                bar.update(sum(lengths))
        if bar is not None:
            bar.close()
    return total


def attribution_map(
    sae: SAE, model: LanguageModel, hook_name: str, text: Text, *, target: LogitTarget | None = None
) -> Float[Tensor, "pos d_sae"]:
    """The terms of a_i on one text: what taking latent i out at position p alone does, to first order.

    In nats a token for the cross-entropy (mean over the text's predicted positions), in logits for a target.
    """
    _check([text], target, model.d_vocab, 0, 1)
    with full_float32():
        way = find_way(model, written_hook(sae, hook_name), text.tokens)
        tokens = torch.tensor([text.tokens])
        value, final = way.run(tokens)
        with torch.inference_mode():
            seeds = _seeds(way, final.detach(), [text], target, 0, 0)
            acts = _acts_where_seen(sae, _read(sae, model, hook_name, tokens, value), [text])[0]
        (gradient,) = _gradients(value, final, [seeds.quantity])
        with torch.inference_mode():
            return -acts * linear(gradient[0].to(acts), sae.W_dec)


def _check(texts: Sequence[Text], target: LogitTarget | None, d_vocab: int, draws: int, batch_size: int) -> None:
    if not texts:
        raise MechintError("no texts: give at least one")
    if draws < 0 or batch_size < 1:
        raise MechintError(f"draws must not be negative and batch_size at least 1, got {draws} and {batch_size}")
    if target is not None:
        target.check(d_vocab)
    for index, text in enumerate(texts):
        n = len(text.tokens)
        if target is None and n < 2:
            raise MechintError(f"text {index + 1} has {n} tokens; a next-token prediction needs two")
        if target is not None and not -n <= target.at < n:
            raise MechintError(f"logit target: text {index + 1} has {n} tokens, so no position {target.at}")


def _seeds(way: Way, final: Tensor, batch: Sequence[Text], target: LogitTarget | None, draws: int, seed: int) -> Seeds:
    """dQ/dfinal of a batch. A text's gradients are its own: nothing of a batch depends on another text of it.

    With p the prediction, dCE/dlogits = p - onehot(target) and d log p(y) / dlogits = onehot(y) - p: the product of p
    with the unembedding, which is nearly all of the work, is the same for all of them.
    """
    lengths = [len(text.tokens) for text in batch]
    quantity = torch.zeros_like(final)
    drawn = [torch.zeros_like(final) for _ in range(draws)]
    if target is not None:
        for index, length in enumerate(lengths):
            quantity[index, target.at % length] = _of_target(way, target, final)
        if draws == 0:
            return Seeds(quantity, [])
    real = torch.zeros(final.shape[:2], dtype=torch.bool)
    for index, length in enumerate(lengths):
        real[index, :length] = True
    where = torch.nonzero(real)
    following = torch.tensor([t for text in batch for t in (*text.tokens[1:], -1)])
    weight = torch.cat([torch.full((length,), 1 / max(length - 1, 1), dtype=final.dtype) for length in lengths])
    uniform = torch.cat([_uniforms(text, draws, seed) for text in batch])
    for rows in torch.arange(len(where)).split(ROWS):
        at = where[rows].unbind(1)
        here = final[at]
        p = way.probs(here)
        mean = way.back(p)
        if target is None:
            next_token, w = following[rows], weight[rows]
            gradient = (mean - way.row(next_token.clamp(min=0).to(here.device), here)) * w.to(here)[:, None]
            quantity[at] = (gradient * (next_token >= 0).to(here)[:, None]).to(final)
        if draws:
            tokens, factor = _draw(p, uniform[rows].to(p))
            for index in range(draws):
                drawn[index][at] = ((way.row(tokens[:, index], here) - mean) * factor[:, index, None]).to(final)
    return Seeds(quantity, drawn)


def _draw(
    p: Float[Tensor, "rows d_vocab"], uniform: Float[Tensor, "rows 2 draws"]
) -> tuple[Int[Tensor, "rows draws"], Float[Tensor, "rows draws"]]:
    """Tokens y and factors c such that v = c (onehot(y) - p) has mean 0 and covariance diag(p) - p p', the Fisher
    information of the logits.

    y drawn from p itself with c = 1 would do, but where the model is sure nearly all of the information is in tokens
    that are hardly ever drawn. Drawn in proportion to p_y |onehot(y) - p|**2 instead, with c**2 = p_y / q_y, |v| is the
    same whatever is drawn; a random sign makes the mean 0.
    """
    square = p.square()
    total_square = square.sum(1, keepdim=True)
    # p_y |onehot(y) - p|**2, with |onehot(y) - p|**2 = 1 - 2 p_y + sum p**2
    total = square.mul_(-2).addcmul_(p, 1 + total_square).cumsum_(1)
    tokens = torch.searchsorted(total, uniform[:, 0] * total[:, -1:], right=True).clamp_(max=p.shape[1] - 1)
    distance = (1 - 2 * p.gather(1, tokens) + total_square).clamp_(min=1e-12)
    factor = (total[:, -1:] / distance).sqrt()
    return tokens, factor.where(uniform[:, 1] < 0.5, -factor)


def _of_target(way: Way, target: LogitTarget, final: Tensor) -> Float[Tensor, " _"]:
    like = final.new_zeros(max(len(target.tokens), len(target.against)), final.shape[-1])
    gradient = way.row(torch.tensor(target.tokens, device=final.device), like[: len(target.tokens)]).mean(0)
    if target.against:
        gradient = gradient - way.row(
            torch.tensor(target.against, device=final.device), like[: len(target.against)]
        ).mean(0)
    return gradient


def _uniforms(text: Text, draws: int, seed: int) -> Float[Tensor, "pos 2 draws"]:
    """Depends on seed and tokens alone, so that neither order nor batches of texts matter."""
    key = zlib.crc32(np.asarray(text.tokens, dtype=np.int64).tobytes(), seed & 0xFFFFFFFF)
    generator = torch.Generator().manual_seed(key)
    return torch.rand(draws, len(text.tokens), 2, generator=generator, dtype=torch.float64).permute(1, 2, 0)


def _read(sae: SAE, model: LanguageModel, hook_name: str, tokens: Tensor, value: Tensor) -> Tensor:
    """What the SAE encodes: the value that is differentiated by, but of a transcoder what stands at another hook."""
    return value.detach() if reads_of(sae, hook_name) is None else model.activations(tokens, hook_name)


def _acts_where_seen(sae: SAE, value: Tensor, batch: Sequence[Text]) -> Float[Tensor, "text pos d_sae"]:
    """`feature_acts`, 0 at padding and where the SAE may not touch."""
    seen = torch.zeros(value.shape[:2], dtype=torch.bool)
    for index, text in enumerate(batch):
        seen[index, : len(text.seen)] = torch.tensor(text.seen)
    return written_acts(sae, value.to(sae.W_enc)).detach() * seen.to(value.device)[..., None]


def _gradients(value: Tensor, final: Tensor, seeds: list[Tensor]) -> Iterator[Tensor]:
    for index, seed in enumerate(seeds):
        with torch.inference_mode(False), torch.enable_grad():
            keep = index < len(seeds) - 1
            (gradient,) = torch.autograd.grad(final, value, seed.clone(), retain_graph=keep)
        yield gradient


def _per_text(
    sae: SAE, acts: Float[Tensor, "text pos d_sae"], gradient: Float[Tensor, "text pos d_in"]
) -> Float[Tensor, "text d_sae"]:
    """a_i of each text, as float64 on the CPU.

    The product with all of W_dec, masked by f = 0, is about 140 times as fast an entry as gathering the decoder rows of
    active entries (512 -> 4096, two cores), so it wins unless fewer than 1 in 140 is active.
    """
    with torch.inference_mode():
        projected = linear(gradient.flatten(0, 1).to(acts), sae.W_dec).view_as(acts)
        return -torch.einsum("tpi,tpi->ti", acts, projected).cpu().double()


def _batches(texts: Sequence[Text], batch_size: int, d_sae: int, max_positions: int) -> Iterator[list[Text]]:
    """Texts of like length together."""
    most = min(max_positions, max(1, MAX_ACTS // d_sae))
    batch: list[Text] = []
    for text in sorted(texts, key=lambda text: len(text.tokens)):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(text.tokens) > most):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch
