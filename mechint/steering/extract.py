"""Where a direction comes from: two sets of prompts, a probe on them, or a latent. And how good it is."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.errors import MechintError, nearest
from mechint.models import LanguageModel
from mechint.sae import SAE
from mechint.steering.direction import Direction, make_direction

TOKENS = ("last", "mean")
# Added to the spread in `extraction_quality`, as in the publishing tools that read the sidecar.
QUALITY_EPSILON = 1e-8
N_FOLDS = 5


class PromptActivations(NamedTuple):
    """One vector a prompt, and the mean norm of the hook's value over all tokens of the prompts but BOS."""

    vectors: Float[Tensor, "n_prompts d_in"]
    mean_norm: float


def prompt_activations(
    model: LanguageModel,
    prompts: Sequence[str],
    hook_name: str,
    *,
    token: str = "last",
    prepend_bos: bool = True,
    context_size: int | None = None,
    batch_size: int = 32,
) -> PromptActivations:
    """What the hook holds for each prompt: at its last token, or the mean over its tokens (BOS left out).

    Raises:
        MechintError: no prompt, a prompt without tokens, an unknown hook, one that is not one vector a token.
    """
    if token not in TOKENS:
        raise MechintError(f"--token {token!r} is not known; {nearest(token, TOKENS)}")
    if not prompts:
        raise MechintError("a set of prompts is empty: give at least one prompt a set, one a line")
    model.check_hook(hook_name)
    rows = model.tokenize(prompts, prepend_bos=prepend_bos, context_size=context_size)
    first = int(prepend_bos)
    for prompt, row in zip(prompts, rows, strict=True):
        if len(row) <= first:
            raise MechintError(f"the prompt {prompt[:40]!r} has no tokens: remove it")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    vectors: list[Tensor] = [torch.empty(0)] * len(rows)
    total, count = 0.0, 0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(rows[i]) for i in batch)
        tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
        for place, i in enumerate(batch):
            tokens[place, : len(rows[i])] = torch.tensor(rows[i])
        hooked = model.activations(tokens, hook_name)
        if hooked.ndim != 3:
            raise MechintError(f"{hook_name} holds {list(hooked.shape[2:])} a token: give a hook with one vector")
        for place, i in enumerate(batch):
            own = hooked[place, first : len(rows[i])].float().cpu()
            vectors[i] = own[-1] if token == "last" else own.mean(0)
            total += float(own.norm(dim=-1).sum())
            count += len(own)
    return PromptActivations(torch.stack(vectors), total / count)


def mean_difference(
    positive: Float[Tensor, "n_positive d_in"], negative: Float[Tensor, "n_negative d_in"]
) -> Float[Tensor, " d_in"]:
    """Mean of the positive class minus mean of the negative one, in activation units."""
    return positive.mean(0) - negative.mean(0)


def probe_weights(
    positive: Float[Tensor, "n_positive d_in"], negative: Float[Tensor, "n_negative d_in"]
) -> Float[Tensor, " d_in"]:
    """Weights of a logistic regression that tells the classes apart, in logits per unit of activation.

    L2 penalty with C = 1 on standardised activations, so that the penalty means the same at every layer and a few large
    dimensions do not decide; classes weigh the same whatever their sizes (scikit-learn's `LogisticRegression`).
    """
    from sklearn.linear_model import LogisticRegression

    x = torch.cat((positive, negative)).double()
    std = x.std(0, unbiased=False)
    # What is left of a constant dimension is rounding; divided by its own size it would look like signal.
    varies = std > 1e-6 * x.abs().amax()
    if not bool(varies.any()):
        raise MechintError("all prompts have the same activation: a probe cannot tell the two sets apart")
    scaled = (x - x.mean(0))[:, varies] / std[varies]
    y = [1] * len(positive) + [0] * len(negative)
    fit = LogisticRegression(C=1.0, class_weight="balanced", max_iter=2000).fit(scaled.numpy(), y)
    weights = torch.zeros_like(std)
    weights[varies] = torch.from_numpy(fit.coef_[0]) / std[varies]
    return weights.float()


RAW_DIRECTION = {"mean-difference": mean_difference, "probe": probe_weights}


def extraction_quality(positive: Float[Tensor, " n_positive"], negative: Float[Tensor, " n_negative"]) -> float:
    """How far apart the classes' projections on the direction lie, in units of their spread:
    (mean(positive) - mean(negative)) / (std(positive) + std(negative) + 1e-8), standard deviations of the population.
    """
    p, n = positive.double(), negative.double()
    spread = p.std(unbiased=False) + n.std(unbiased=False)
    return float((p.mean() - n.mean()) / (spread + QUALITY_EPSILON))


def heldout_accuracy(
    positive: Float[Tensor, "n_positive d_in"],
    negative: Float[Tensor, "n_negative d_in"],
    *,
    method: str = "mean-difference",
    seed: int = 0,
) -> float | None:
    """Share of prompts put in the right class by a direction made without them; the mean of both classes' shares.

    Each class is dealt into 5 folds (fewer if it has fewer prompts), shuffled by `seed`; the cut is half-way between
    the classes' mean projections. None with fewer than two prompts in a class. 0.5 is chance: quality on the prompts
    that made a direction is always high in a wide space, this is not.
    """
    n_folds = min(N_FOLDS, len(positive), len(negative))
    if n_folds < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    folds = [torch.randperm(len(x), generator=generator) % n_folds for x in (positive, negative)]
    right = torch.zeros(2, dtype=torch.float64)
    for fold in range(n_folds):
        kept = [x[own != fold] for x, own in zip((positive, negative), folds, strict=True)]
        raw = RAW_DIRECTION[method](*kept)
        cut = float((kept[0] @ raw).mean() + (kept[1] @ raw).mean()) / 2
        right[0] += int((positive[folds[0] == fold] @ raw > cut).sum())
        right[1] += int((negative[folds[1] == fold] @ raw <= cut).sum())
    return float((right / torch.tensor([len(positive), len(negative)])).mean())


def direction_from_prompts(
    model: LanguageModel,
    hook_name: str,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    classes: tuple[str, str] = ("positive", "negative"),
    name: str | None = None,
    method: str = "mean-difference",
    token: str = "last",
    prepend_bos: bool = True,
    context_size: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    **info: Any,
) -> Direction:
    """The direction from the negative to the positive prompts at a hook.

    "mean-difference" is the difference of the class means, "probe" the weights of a logistic regression. `info` is
    added to the sidecar (license, description, source_paper, source_run_id ...).

    Raises:
        MechintError: an empty set, a prompt without tokens, an unknown hook, sets that cannot be told apart.
    """
    if method not in RAW_DIRECTION:
        raise MechintError(f"--method {method!r} is not known; {nearest(method, RAW_DIRECTION)}")
    if classes[0] == classes[1]:
        raise MechintError(f"both classes are called {classes[0]!r}: give them different names")
    for prompts, own in zip((positive, negative), classes, strict=True):
        if not prompts:
            raise MechintError(f"the {own} prompts are empty: give at least one")
    both = set(positive) & set(negative)
    if both:
        raise MechintError(f"{len(both)} prompts are in both sets, such as {min(both)[:40]!r}: keep each in one")
    p, n = (
        prompt_activations(
            model,
            prompts,
            hook_name,
            token=token,
            prepend_bos=prepend_bos,
            context_size=context_size,
            batch_size=batch_size,
        )
        for prompts in (positive, negative)
    )
    weights = (len(positive), len(negative))
    direction = make_direction(
        RAW_DIRECTION[method](p.vectors, n.vectors),
        name=name or f"{classes[0]}-{classes[1]}",
        source=method,
        token=token,
        mean_activation_norm=(p.mean_norm * weights[0] + n.mean_norm * weights[1]) / sum(weights),
        heldout_accuracy=heldout_accuracy(p.vectors, n.vectors, method=method, seed=seed),
        **_place(model, hook_name, prepend_bos),
        **info,
    )
    return score_direction(direction, p.vectors, n.vectors, classes)


def score_direction(
    direction: Direction,
    positive: Float[Tensor, "n_positive d_in"],
    negative: Float[Tensor, "n_negative d_in"],
    classes: tuple[str, str],
) -> Direction:
    """The direction with what the prompts say of it in its sidecar: quality, mean projections, counts."""
    projections = [x.double() @ direction.vector.double() for x in (positive, negative)]
    found = {
        "extraction_quality": extraction_quality(*projections),
        "mean_projections": {own: float(x.mean()) for own, x in zip(classes, projections, strict=True)},
        **{f"{own}_prompt_count": len(x) for own, x in zip(classes, projections, strict=True)},
    }
    return Direction(direction.vector, {**direction.info, **found})


def direction_from_latent(
    sae: SAE, latent: int, model: LanguageModel, hook_name: str, *, name: str | None = None, **info: Any
) -> Direction:
    """What a latent writes: its decoder row, divided by its norm.

    Raises:
        MechintError: no such latent, or one whose decoder row is zero.
    """
    check_latent(sae, latent)
    return make_direction(
        sae.W_dec[latent],
        name=name or f"latent-{latent}",
        source="latent",
        latent=latent,
        extraction_quality=None,
        **_place(model, hook_name, bool(sae.metadata.get("prepend_bos", True))),
        **info,
    )


def check_latent(sae: SAE, latent: int) -> None:
    """Raise `MechintError` unless the SAE has the latent."""
    if not 0 <= latent < sae.d_sae:
        raise MechintError(f"latent {latent} does not exist: the SAE has {sae.d_sae:,}, numbered 0 to {sae.d_sae - 1}")


def _place(model: LanguageModel, hook_name: str, prepend_bos: bool) -> dict[str, Any]:
    return {
        "model": model.name,
        "model_sha256": model.weights_sha256(),
        "hook_site": hook_name,
        "processing": model.processing,
        "prepend_bos": prepend_bos,
    }
