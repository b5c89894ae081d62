"""Settings of `train_sae.py`."""

import contextlib
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import arg

from mechint.config.base import DEFAULT_HOOK, Config, Processing, Unsaid, UnsaidInt, check_run_name, require
from mechint.config.presets import ORIGINAL_KEYS, TRAIN_PRESETS, learning_rate_for, of_others, preset_values
from mechint.errors import MechintError, nearest

Preset = Literal[
    "none", "mech-int", "mechint", "mechint-topk", "anthropic-2024-04", "anthropic-2025-01", "gao-2024", "batchtopk"
]
# What --help says of the fields that are recorded.
RECORDED = "(if not given: as the activations say, else unknown)"
# Fields that only some architectures have; which ones, the architectures say themselves (`SAE.options`).
ARCHITECTURE_OPTIONS = (
    "k",
    "widths",
    "prefixes",
    "penalty",
    "target_l0",
    "bandwidth",
    "init_threshold",
    "tanh_scale",
    "ste_to_input",
    "pre_act_coefficient",
    "saturation",
)


# Fields that are a number of steps (of vectors) or a share of all.
SHARES = ("warmup_steps", "lambda_warmup_steps", "resample_every", "dead_after")


def percent(share: float) -> str:
    """A share as such a field has it: 0.05 is "5%"."""
    return f"{(Decimal(repr(share)) * 100).normalize():f}%"


def share_of(text: str) -> float:
    """The other way round. Raises `ValueError` if `text` is no percentage."""
    if not text.endswith("%"):
        raise ValueError(text)
    return float(Decimal(text[:-1]) / 100)


def check_steps(flag: str, value: int | str) -> None:
    """Raise `MechintError` unless this is a number of steps or a share of all."""
    try:
        good = value >= 0 if isinstance(value, int) else 0 <= share_of(value) <= 1
    except (ValueError, ArithmeticError):
        good = False
    if good:
        return
    told = f"{flag} takes a whole number from 0, or a share from 0% to 100%, got {value}"
    with contextlib.suppress(ValueError):
        if 0 < float(value) <= 1:
            told += f": write {percent(float(value))}"
    raise MechintError(told)


def architecture_names() -> list[str]:
    """The architectures there are: one file each in mechint/sae/architectures (read without importing torch)."""
    folder = Path(__file__).parent.parent / "sae" / "architectures"
    return sorted(path.stem for path in folder.glob("[!_]*.py"))


TrainConfigT = TypeVar("TrainConfigT", bound="SAETrainConfig")


@dataclass(frozen=True)
class SAETrainConfig(Config):
    """Train a sparse autoencoder; by default the canonical one: ReLU, L1, decoder rows renormalised after each step.

    Numbers of steps may also be given as a share of all steps: 5% is the first twentieth.
    """

    activations_path: str = "activations/activations_50000.pt"
    """What to train on: a store folder, or a .pt tensor."""
    live: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """Settings of collect for a training straight from a model: `activations_path` then holds the held-out rows."""
    buffer_rows: int = 262_144
    """Straight from a model: rows that are held on the device, to draw batches from."""
    activation_dim: Annotated[int, arg(aliases=["--d-in"])] = 512
    """Width of the activations, d_in; taken from the activations if not given."""
    expansion: Annotated[int | None, arg(help_behavior_hint="(8 if neither this nor --d-sae is given)")] = None
    """Latents per input dimension: d_sae = expansion * d_in."""
    d_sae: Annotated[int | None, arg(help_behavior_hint="(if not given: expansion * d_in)")] = None
    """Number of latents, in place of --expansion; need not be a multiple of d_in."""
    architecture: str = "standard"
    """standard (ReLU and L1), topk, batchtopk, matryoshka_batchtopk, jumprelu or gated; or a file that you added."""
    k: float | None = None
    """topk, batchtopk, matryoshka_batchtopk: active latents a vector (batchtopk: on average). 32 if not given."""
    l1_lambda: Annotated[float, arg(aliases=["--lam", "--l1-coefficient", "--l0-coefficient"])] = 3.0
    """Weight of the sparsity penalty beside the mean squared error per dimension; topk and batchtopk have none."""
    l1_reduction: Literal["mean", "sum"] = "mean"
    """mean: --lam weighs the mean of |f| over latents, as the original. sum: it weighs sum |f| against the sum of
    squared errors, as in papers, and means the same at every width."""
    epochs: Annotated[int, arg(aliases=["--steps"])] = 50_000
    """Optimiser steps, one random batch each (called epochs for historical reasons)."""
    learning_rate: Annotated[float | None, arg(aliases=["--lr"], help_behavior_hint="(3e-4; mechint: by d_sae)")] = 3e-4
    """Peak learning rate of Adam."""
    batch_size: int = 4096
    """Activation vectors a step."""
    warmup_steps: int | str = 2000
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a cosine to 0, or constant and then linear to 0 over the last --decay-share."""
    decay_share: float = 0.2
    """Share of the steps, at the end, over which a constant learning rate falls to 0."""
    lambda_warmup_steps: int | str = 5000
    """Steps over which the sparsity weight rises linearly from 0; 0 means constant."""
    adam_beta1: float = 0.9
    """Adam's decay of the mean of gradients."""
    adam_beta2: float = 0.999
    """Adam's decay of the mean of squared gradients."""
    max_grad_norm: float = 1.0
    """Total gradient norm is clipped to this before each step."""
    decoder: Literal["unit", "free"] = "unit"
    """unit: decoder rows are renormalised after each step. free: penalty and selection weigh latents by the norm of
    their row instead, and the norms are folded into the encoder when the SAE is saved."""
    project_gradient: bool = False
    """Remove from each decoder row's gradient its part along the row."""
    init: Literal["xavier", "tied", "fitted"] = "xavier"
    """xavier: encoder and decoder drawn independently. tied: the encoder starts as the decoder's transpose. fitted:
    tied, and then times the one number with which the first reconstructions fit best."""
    init_decoder_norm: float = 1.0
    """Norm of the decoder rows at the start, for --decoder free."""
    init_l0: float | None = None
    """Encoder biases start so that each latent is active on init_l0 / d_sae of the vectors; at 0 if not given."""
    b_dec_init: Literal["zero", "mean", "median"] = "zero"
    """Start of b_dec: 0, or the mean or geometric median of the training rows (of a sample of 65,536)."""
    normalize_inputs: Literal["none", "mean-norm", "centred-norm"] = "none"
    """Train on activations times one number that makes their mean norm sqrt(d_in), or that of their distance from
    their mean; it is divided out again when the SAE is saved."""
    max_norm_multiple: float = 0.0
    """Leave rows whose norm is above this many times the median norm out of training, as in most language models a few
    such rows would dominate the squared error; 0 keeps all."""
    revive: Literal["none", "auxk", "resample"] = "none"
    """What becomes of dead latents: auxk gives them a loss of their own, resample sets them anew."""
    dead_after: int | str = 1_000_000
    """A latent counts as dead when it was silent for this many vectors, or for this share of the training's (2%)."""
    k_aux: int | None = None
    """auxk: dead latents that reconstruct the residual of each vector; d_in / 2 if not given."""
    aux_coefficient: float = 1 / 32
    """auxk: weight of that term."""
    resample_every: int | str = "10%"
    """resample: steps between two rounds; the last one is at half of the training."""
    widths: tuple[int, ...] | None = None
    """matryoshka_batchtopk: nested prefixes of the dictionary; d_sae / 16, / 8, / 4, / 2 and d_sae if not given."""
    prefixes: int | None = None
    """matryoshka_batchtopk: draw this many prefixes anew for each step instead (Pareto-distributed lengths)."""
    penalty: Literal["step", "tanh", "quadratic"] | None = None
    """jumprelu: number of active latents, sum of tanh(c f), or squared distance of L0 from --target-l0."""
    target_l0: float | None = None
    """The L0 to reach: the weight of the penalty starts at --lam and is steered there during training. (jumprelu with
    --penalty quadratic: the penalty itself is the distance.)"""
    bandwidth: float | None = None
    """jumprelu: width around the threshold through which it learns. 0.05 if not given."""
    init_threshold: float | None = None
    """jumprelu: thresholds at the start. 0.01 if not given."""
    tanh_scale: float | None = None
    """jumprelu with --penalty tanh: c in tanh(c f). 4 if not given."""
    ste_to_input: bool | None = None
    """jumprelu: let the penalty's step push the pre-activations too, not only the threshold."""
    pre_act_coefficient: float | None = None
    """jumprelu: weight of the distance of dead latents' pre-activations below their thresholds. 0 if not given."""
    saturation: float | None = None
    """standard: the penalty weighs f / (1 + saturation * f) instead of f, so that it shrinks strong activations less.
    0 if not given: the L1."""
    option: tuple[str, ...] = ()
    """NAME=VALUE settings of an architecture of your own that has no flag here."""
    kernel: str = "auto"
    """How steps are computed: auto takes the fastest that is exact here; dense is the reference."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Of matrix products; weights and Adam are float32 in all. float32: exact. tf32, bf16: lossy, factors are rounded
    to 10 or 7 bits of mantissa, for speed; tf32 needs CUDA."""
    shard_latents: bool = False
    """Under torchrun: split the latents, not the rows, over the processes: a dictionary too large for one device."""
    track: Literal["none", "trackio", "tensorboard", "wandb"] = "none"
    """Also send the rows of metrics.csv there (needs the package of that name)."""
    val_fraction: float = 0.05
    """Share held out for validation."""
    seed: int = 42
    """Seed of initial weights, split and batches."""
    eval_batch_size: int = 8192
    """Vectors at once during evaluation."""
    split_by: Literal["text", "row"] = "text"
    """What is held out: whole texts, or single rows as the original did (rows of one text then land on both sides)."""
    batch_order: Literal["shuffle", "counter", "torch"] = "shuffle"
    """shuffle: each row once an epoch, in another order each. counter: drawn with replacement. Both depend on seed and
    step alone. torch: with replacement from the original's sequential generator."""
    preset: Preset = "none"
    """Named settings (docs/training.md): mechint, ours; mech-int, the original's split and batches; published ones."""
    save_every: int = 1000
    """Steps between saved states; a killed run goes on from the last one. 0: only at Ctrl-C and at the end."""
    log_every: int = 0
    """Steps between rows of metrics.csv; 0 means ten rows a run, as the original wrote."""
    runs_root: str = "runs"
    """Folder that run directories are made in."""
    run_name: str | None = None
    """Name of the run directory; the date and time if not given. An existing name gets -1, -2, ... appended."""
    device: str | None = None
    """cuda, mps or cpu; the best that works if not given."""
    legacy_layout: bool = False
    """Write saved_models/ and training_metrics/ as the first version did, instead of a run directory."""
    model_name: Annotated[str | None, arg(aliases=["--model"], help_behavior_hint=RECORDED)] = Unsaid("pythia-70m")
    """Model that the activations are of, for activations that do not say; another than they say is an error."""
    model_source: Annotated[str | None, arg(help_behavior_hint=RECORDED)] = Unsaid("EleutherAI/pythia-70m")
    """Hub id or folder of that model; as --model-name."""
    layer: Annotated[int | None, arg(help_behavior_hint="(follows from the hook)")] = UnsaidInt(3)
    """Recorded; follows from the hook where that is known."""
    hook_name: Annotated[str | None, arg(aliases=["--hook"], help_behavior_hint=RECORDED)] = Unsaid(DEFAULT_HOOK)
    """Where in the model the activations were read; as --model-name."""
    processing: Annotated[Processing | None, arg(help_behavior_hint=RECORDED)] = None
    """How the activations were processed, as in collect; as --model-name."""
    prepend_bos: Annotated[bool | None, arg(help_behavior_hint=RECORDED)] = None
    """Whether BOS stood before each text (--no-prepend-bos: it did not); as --model-name."""
    dataset_name: Annotated[str | None, arg(aliases=["--dataset"], help_behavior_hint=RECORDED)] = Unsaid("openwebtext")
    """Texts that the activations are of; as --model-name."""
    dataset_split: Annotated[str | None, arg(help_behavior_hint=RECORDED)] = Unsaid("train")
    """Split of them; as --model-name."""
    num_texts: Annotated[int | None, arg(help_behavior_hint=RECORDED)] = UnsaidInt(50_000)
    """Number of them; what the activations say is right."""
    max_chars: Annotated[int | None, arg(help_behavior_hint=RECORDED)] = UnsaidInt(512)
    """Characters kept of each; as --model-name."""

    @classmethod
    def aliases(cls) -> dict[str, str]:
        return {
            "steps": "epochs",
            "d_in": "activation_dim",
            "lam": "l1_lambda",
            "l1_coefficient": "l1_lambda",
            "lr": "learning_rate",
            "hook": "hook_name",
            "model": "model_name",
            "dataset": "dataset_name",
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "config") -> "SAETrainConfig":
        """As `Config.from_dict`; a JSON that has none of the newer keys was written by the original pipeline and gets
        its settings (row split, sequential batches), so that its numbers can be reproduced."""
        written_before = values.keys() >= ORIGINAL_KEYS and not values.keys() & {"split_by", "batch_order"}
        preset = values.get("preset", "mech-int" if written_before else "none")
        if not isinstance(preset, str) or preset not in TRAIN_PRESETS:
            raise MechintError(f"{source}: unknown preset {preset!r}; {nearest(str(preset), TRAIN_PRESETS)}")
        architecture = values.get("architecture")
        architecture = architecture if isinstance(architecture, str) else None
        own, others = preset_values(preset, architecture), of_others(preset, architecture)
        if values.keys() >= ORIGINAL_KEYS and not written_before:
            own = {}  # a whole config.json: a setting that its version did not have is at its default
        # files of earlier versions hold shares as numbers with a decimal point
        old = {key: percent(values[key]) for key in SHARES if isinstance(values.get(key), float) and values[key] <= 1}
        values = {key: value for key, value in (values | old).items() if key not in others or value != others[key]}
        return super().from_dict({**own, "preset": preset, **values}, source=source)

    @classmethod
    def superseded(cls, given: Collection[str], under: dict[str, Any]) -> tuple[str, ...]:
        """The width is said in one of two ways, and the later one counts: a saved config.json holds both."""
        widths = {"expansion", "d_sae"} & set(given)
        if len(widths) == 1:
            return tuple({"expansion", "d_sae"} - widths)
        # at another d_in, so many latents per dimension stay so many
        other_d_in = bool({"activation_dim", "d_in"} & set(given)) and under.get("expansion") is not None
        return ("d_sae",) if other_d_in and not widths else ()

    def __post_init__(self) -> None:
        if self.expansion is None and self.d_sae is None:
            object.__setattr__(self, "expansion", 8)
        for name in ("activation_dim", "expansion", "d_sae", "epochs", "batch_size", "eval_batch_size", "buffer_rows"):
            value = getattr(self, name)
            require(value is None or value > 0, f"--{name.replace('_', '-')} must be at least 1, got {value}")
        self.check_width()
        for name in ("l1_lambda", "aux_coefficient", "save_every", "log_every", "max_norm_multiple"):
            value = getattr(self, name)
            require(value >= 0, f"--{name.replace('_', '-')} must not be negative, got {value}")
        for name in SHARES:
            check_steps(f"--{name.replace('_', '-')}", getattr(self, name))
        for name in ("l1_lambda", "learning_rate", "aux_coefficient", "max_norm_multiple"):
            value = getattr(self, name)
            require(value is None or math.isfinite(value), f"--{name.replace('_', '-')} must be a finite number")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name.replace('_', '-')} must be at least 0 and below 1, got {value}")
        lr = self.learning_rate
        require(lr is None or lr > 0, f"--learning-rate must be above 0, got {self.learning_rate}")
        require(0 <= self.decay_share <= 1, f"--decay-share is a share of the steps, 0 to 1, got {self.decay_share}")
        require(0 <= self.seed < 2**63, f"--seed must be at least 0 and below 2**63, got {self.seed}")
        require(self.max_grad_norm > 0, f"--max-grad-norm must be above 0, got {self.max_grad_norm}")
        require(
            0 <= self.val_fraction < 1,
            f"--val-fraction is the share held out, 0 <= share < 1, got {self.val_fraction:g}: nothing would be left"
            " to train on",
        )
        names = architecture_names()
        if self.architecture not in names:
            raise MechintError(f"unknown --architecture {self.architecture!r}; {nearest(self.architecture, names)}")
        require(self.k is None or self.k > 0, f"--k must be above 0, got {self.k}")
        require(self.k_aux is None or self.k_aux > 0, f"--k-aux must be at least 1, got {self.k_aux}")
        require(self.target_l0 is None or self.target_l0 > 0, f"--target-l0 must be above 0, got {self.target_l0}")
        require(self.init_l0 is None or self.init_l0 > 0, f"--init-l0 must be above 0, got {self.init_l0}")
        require(self.init_decoder_norm > 0, f"--init-decoder-norm must be above 0, got {self.init_decoder_norm}")
        require(
            self.init_decoder_norm == 1.0 or self.decoder == "free",
            "--init-decoder-norm needs --decoder free: the rows of a unit decoder have norm 1",
        )
        if self.precision != "float32":
            lossy = f"--precision {self.precision}"
            require(self.kernel in ("auto", "manual"), f"{lossy} needs --kernel manual: {self.kernel} is exact")
            require(self.decoder == "unit", f"{lossy} needs --decoder unit: free rows are trained in float32 only")
            require(not self.shard_latents, f"{lossy} and --shard-latents do not go together: leave one out")
        for word in self.option:
            require("=" in word, f"--option takes NAME=VALUE, got {word!r}")
        if self.run_name is not None:
            check_run_name(self.run_name)

    def steps_of(self, value: int | str) -> int:
        """A number of steps: as it is, or as a share of all of them."""
        return value if isinstance(value, int) else round(share_of(value) * self.epochs)

    @property
    def steers_l0(self) -> bool:
        """Whether the weight of the penalty is steered towards `target_l0`, which is not part of the penalty itself."""
        return self.target_l0 is not None and self.penalty != "quadratic"

    @property
    def dead_after_vectors(self) -> int:
        """`dead_after` as a number of vectors."""
        if isinstance(self.dead_after, int):
            return max(1, self.dead_after)
        return max(1, round(share_of(self.dead_after) * self.steps * self.batch_size))

    @property
    def architecture_options(self) -> dict[str, Any]:
        """What the architecture's class is made with, beside the widths."""
        given = {name: getattr(self, name) for name in ARCHITECTURE_OPTIONS if getattr(self, name) is not None}
        if self.steers_l0:
            del given["target_l0"]
        return given | dict(word.split("=", 1) for word in self.option)

    def check_width(self) -> None:
        """Raise `MechintError` where `expansion` and `d_sae` say two things."""
        if self.expansion is None or self.d_sae in (None, self.expansion * self.activation_dim):
            return
        raise MechintError(
            f"--d-sae {self.d_sae} and --expansion {self.expansion} contradict each other: {self.expansion} times d_in"
            f" {self.activation_dim} is {self.expansion * self.activation_dim}; give one of the two"
        )

    @property
    def num_features(self) -> int:
        """The number of latents, whichever way it was said."""
        if self.d_sae is not None:
            return self.d_sae
        assert self.expansion is not None, "__post_init__ sees to one of the two"
        return self.activation_dim * self.expansion

    def with_latents(self: "TrainConfigT", d_sae: int) -> "TrainConfigT":
        """A copy with this many latents, said in both ways where d_in divides it."""
        whole = d_sae % self.activation_dim == 0
        return replace(self, d_sae=d_sae, expansion=d_sae // self.activation_dim if whole else None)

    def with_learning_rate(self: "TrainConfigT") -> "TrainConfigT":
        """A copy that says its learning rate, where the preset leaves it to the width."""
        return replace(self, learning_rate=self.peak_learning_rate)

    @property
    def peak_learning_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return learning_rate_for(self.architecture, self.num_features)

    @property
    def width_setting(self) -> tuple[str, int]:
        """Name and value of the setting that says the width: `expansion` where it can."""
        return ("d_sae", self.num_features) if self.expansion is None else ("expansion", self.expansion)

    @property
    def width_label(self) -> str:
        """The width for people and for names: `8x`, or `1000 latents` where d_in does not divide it."""
        times, rest = divmod(self.num_features, self.activation_dim)
        return f"{self.num_features} latents" if rest else f"{times}x"

    @property
    def steps(self) -> int:
        return self.epochs
