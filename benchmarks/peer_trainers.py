"""The peers' own trainers behind one face, for the benchmarks beside this file. Needs the environment of peers.py.

SAELens is driven through `SAETrainer.step`, dictionary_learning through its trainers' `update`. sparsify's `Trainer`
wants a language model, so what its `fit` does around a `SparseCoder` with loss_fn="fvu" is written here anew.
"""

import contextlib
import io
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TOPK_FAMILY = ("topk", "batchtopk", "matryoshka_batchtopk")


@dataclass(frozen=True)
class Recipe:
    """One training, in the words that the peers share. `sparsity` is k for the topk family, else the coefficient in
    the peer's own loss (both take sums over d_in and d_sae, averaged over the batch)."""

    architecture: str
    d_in: int
    d_sae: int
    steps: int
    batch_size: int
    lr: float
    sparsity: float
    lr_warmup: int = 0
    sparsity_warmup: int = 0
    decay: int = 0  # steps of linear decay to 0 at the end
    dead_after: int = 1000  # steps without firing after which the revival losses take a latent for dead
    seed: int = 0
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)  # passed on to the peer's own config


class Trainee(NamedTuple):
    step: Callable[[Tensor], object]
    module: nn.Module
    encode: Callable[[Tensor], Tensor]  # feature_acts as the saved SAE would give them
    decode: Callable[[Tensor], Tensor]


def matryoshka_widths(d_sae: int) -> list[int]:
    """Five nested prefixes, each twice the one before."""
    return [d_sae // 16, d_sae // 8, d_sae // 4, d_sae // 2, d_sae]


def saelens(recipe: Recipe) -> Trainee:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import sae_lens.saes.batchtopk_sae as batchtopk
        import sae_lens.saes.gated_sae as gated
        import sae_lens.saes.jumprelu_sae as jumprelu
        import sae_lens.saes.matryoshka_batchtopk_sae as matryoshka
        import sae_lens.saes.standard_sae as standard
        import sae_lens.saes.topk_sae as topk
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

    common: dict[str, Any] = {
        "d_in": recipe.d_in,
        "d_sae": recipe.d_sae,
        "device": recipe.device,
        **recipe.options,
    }
    l1 = {"l1_coefficient": recipe.sparsity, "l1_warm_up_steps": recipe.sparsity_warmup}
    l0 = {"l0_coefficient": recipe.sparsity, "l0_warm_up_steps": recipe.sparsity_warmup}
    makers: dict[str, Callable[[], Any]] = {
        "standard": lambda: standard.StandardTrainingSAE(standard.StandardTrainingSAEConfig(**common, **l1)),
        "gated": lambda: gated.GatedTrainingSAE(gated.GatedTrainingSAEConfig(**common, **l1)),
        "jumprelu": lambda: jumprelu.JumpReLUTrainingSAE(jumprelu.JumpReLUTrainingSAEConfig(**common, **l0)),
        "topk": lambda: topk.TopKTrainingSAE(topk.TopKTrainingSAEConfig(**common, k=int(recipe.sparsity))),
        "batchtopk": lambda: batchtopk.BatchTopKTrainingSAE(
            batchtopk.BatchTopKTrainingSAEConfig(**common, k=recipe.sparsity)
        ),
        "matryoshka_batchtopk": lambda: matryoshka.MatryoshkaBatchTopKTrainingSAE(
            matryoshka.MatryoshkaBatchTopKTrainingSAEConfig(
                **common, k=recipe.sparsity, matryoshka_widths=matryoshka_widths(recipe.d_sae)
            )
        ),
    }
    torch.manual_seed(recipe.seed)
    sae = makers[recipe.architecture]()
    config = SAETrainerConfig(
        total_training_samples=recipe.steps * recipe.batch_size,
        train_batch_size_samples=recipe.batch_size,
        lr=recipe.lr,
        lr_end=recipe.lr / 10,  # unused by its constant schedule, but wanted
        lr_warm_up_steps=recipe.lr_warmup,
        lr_decay_steps=recipe.decay,
        dead_feature_window=recipe.dead_after,
        device=recipe.device,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1  # `fit` does this after its logging

    def encode(x: Tensor) -> Tensor:
        if recipe.architecture in ("batchtopk", "matryoshka_batchtopk"):
            # Saved as a JumpReLU SAE whose threshold is the running cut.
            _, pre = sae.encode_with_hidden_pre(x)
            return torch.relu(pre) * (pre > sae.topk_threshold)
        return sae.encode(x)

    return Trainee(step, sae, encode, sae.decode)


def dictionary_learning(recipe: Recipe) -> Trainee:
    _without_nnsight()
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
    from dictionary_learning.trainers.top_k import TopKTrainer

    settings: dict[str, Any] = {
        "steps": recipe.steps,
        "activation_dim": recipe.d_in,
        "dict_size": recipe.d_sae,
        "layer": 0,
        "lm_name": "none",
        "lr": recipe.lr,
        "warmup_steps": recipe.lr_warmup,
        "decay_start": recipe.steps - recipe.decay if recipe.decay else None,
        "seed": recipe.seed,
        "device": recipe.device,
    } | recipe.options
    widths = [0, *matryoshka_widths(recipe.d_sae)]
    fractions = [(b - a) / recipe.d_sae for a, b in zip(widths, widths[1:], strict=False)]
    makers: dict[str, Callable[[], Any]] = {
        "standard": lambda: StandardTrainer(**settings, **l1),
        "standard_april": lambda: StandardTrainerAprilUpdate(**settings, **l1),
        "gated": lambda: GatedSAETrainer(**settings, **l1),
        # Its penalty is quadratic around a target L0, so that the target is what is tuned.
        "jumprelu": lambda: JumpReluTrainer(**settings, **warm, target_l0=recipe.sparsity),
        "topk": lambda: TopKTrainer(**settings, **k),
        "batchtopk": lambda: BatchTopKTrainer(**settings, **k),
        "matryoshka_batchtopk": lambda: MatryoshkaBatchTopKTrainer(**settings, **k, group_fractions=fractions),
    }
    warm = {"sparsity_warmup_steps": recipe.sparsity_warmup}
    l1 = {"l1_penalty": recipe.sparsity, **warm}
    k = {"k": int(recipe.sparsity), "threshold_start_step": min(1000, recipe.steps // 2)}
    torch.manual_seed(recipe.seed)  # not every trainer seeds itself
    trainer = makers[recipe.architecture]()
    if hasattr(trainer, "dead_feature_threshold"):
        trainer.dead_feature_threshold = recipe.dead_after * recipe.batch_size  # counted in tokens
    count = 0

    def step(x: Tensor) -> None:
        nonlocal count
        trainer.update(count, x)
        count += 1

    ae = trainer.ae
    # The batch-wise ones are saved with their threshold, and encode with it unless told otherwise.
    return Trainee(step, ae, ae.encode, ae.decode)


def sparsify(recipe: Recipe) -> Trainee:
    """Architecture topk. `options["optimizer"]`: "adam", or its default "signum"."""
    with contextlib.redirect_stdout(io.StringIO()):
        from schedulefree import ScheduleFreeWrapper
        from sparsify.config import SparseCoderConfig
        from sparsify.sign_sgd import SignSGD
        from sparsify.sparse_coder import SparseCoder
        from transformers import get_linear_schedule_with_warmup

    assert recipe.architecture == "topk", "sparsify trains topk"
    torch.manual_seed(recipe.seed)
    config = SparseCoderConfig(num_latents=recipe.d_sae, k=int(recipe.sparsity))
    coder = SparseCoder(recipe.d_in, config, device=recipe.device)
    auxk_alpha = recipe.options.get("auxk_alpha", 0.0)
    scheduler = None
    optimizer: Any
    if recipe.options.get("optimizer", "signum") == "adam":
        optimizer = torch.optim.Adam(coder.parameters(), lr=recipe.lr)
        scheduler = get_linear_schedule_with_warmup(optimizer, recipe.lr_warmup, recipe.steps)
    else:
        optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=recipe.lr), momentum=0.95)
        optimizer.train()
    since_fired = torch.zeros(recipe.d_sae, dtype=torch.long, device=recipe.device)
    first = True

    def step(x: Tensor) -> None:
        nonlocal first
        if first:
            coder.b_dec.data = x.mean(0)
            first = False
        coder.set_decoder_norm_to_unit_norm()
        dead = since_fired > recipe.dead_after * recipe.batch_size if auxk_alpha else None
        out = coder(x, dead_mask=dead, total_variance=(x - x.mean(0)).pow(2).sum())
        fired = torch.zeros_like(since_fired, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())  # its progress record
        (out.fvu + auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        since_fired.add_(len(x))
        since_fired[fired] = 0

    def encode(x: Tensor) -> Tensor:
        top = coder.encode(x)
        return torch.zeros(len(x), recipe.d_sae, device=x.device).scatter_(1, top.top_indices, top.top_acts)

    assert coder.W_dec is not None
    return Trainee(step, coder, encode, lambda f: f @ coder.W_dec + coder.b_dec)


FAMILIES: dict[str, Callable[[Recipe], Trainee]] = {
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
}


@torch.no_grad()
def set_weights(trainee: Trainee, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> None:
    """Copy weights into whatever the peer calls its own; biases and thresholds that have no counterpart stay."""
    names = dict(trainee.module.named_parameters())
    wanted = {
        "W_enc": W_enc,
        "encoder.weight": W_enc.t(),
        "b_enc": b_enc,
        "encoder.bias": b_enc,
        "gate_bias": b_enc,
        "b_gate": b_enc,
        "mag_bias": b_enc,
        "b_mag": b_enc,
        "W_dec": W_dec,
        "decoder.weight": W_dec.t(),
        "b_dec": b_dec,
        "bias": b_dec,
        "decoder_bias": b_dec,
    }
    for name, parameter in names.items():
        if name in wanted:
            parameter.copy_(wanted[name])


def _without_nnsight() -> None:
    """dictionary_learning's package file imports a model class from nnsight, for an activation buffer not used here."""
    try:
        import nnsight  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType("nnsight")
        stand_in.LanguageModel = object  # type: ignore[attr-defined]
        sys.modules["nnsight"] = stand_in
