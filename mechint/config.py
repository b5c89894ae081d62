"""The settings of each command. A field is a flag, its help, a key of config.json and an argument in Python, at once.

A config is a value: nothing is resolved, opened or logged here. Names that the first version of the pipeline used
(`epochs`, `l1_lambda`, `activation_dim`, ...) stay, because old config.json files and scripts use them; the word of the
field is an alias of the flag. `d_sae` and `layer` are derived, never set beside what decides them.
"""

import contextlib
import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import arg

from mechint.errors import MechintError, nearest

# `openwebtext` alone is a data set with a loading script, which datasets >= 4 refuses; this one is plain parquet.
DATASET_ALIASES = {"openwebtext": "Skylion007/openwebtext"}
DEFAULT_HOOK = "blocks.3.hook_resid_post"

Processing = Literal["raw", "centred"]
Backend = Literal["auto", "transformers", "bridge"]
Dtype = Literal["float32", "bfloat16", "float16"]


# Not typing.Self, which the shape checks of the tests (beartype) cannot take on methods of undecorated classes.
ConfigT = TypeVar("ConfigT", bound="Config")


@dataclass(frozen=True)
class Config:
    """What every config can do: JSON in and out with unknown keys refused, and changed copies."""

    # Other names a JSON key or keyword may have; overridden where a class has any.
    @classmethod
    def aliases(cls) -> dict[str, str]:
        return {}

    @classmethod
    def field_names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def from_dict(cls: type[ConfigT], values: dict[str, Any], *, source: str = "config") -> ConfigT:
        """Build from a JSON object. Raises `MechintError` for an unknown key or a value of the wrong kind."""
        known = cls.field_names()
        renamed: dict[str, Any] = {}
        for key, value in values.items():
            name = cls.aliases().get(key, key)
            if name not in known:
                raise MechintError(f"{source}: unknown key {key!r}; {nearest(key, known)}")
            if name in renamed:
                raise MechintError(f"{source}: {key!r} and another key both set {name!r}; keep one")
            renamed[name] = value
        for field in dataclasses.fields(cls):
            if field.name in renamed:
                renamed[field.name] = _checked(field, renamed[field.name], source)
        return cls(**renamed)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            key: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def with_overrides(self: ConfigT, **overrides: Any) -> ConfigT:
        """A copy with the given fields replaced; None means "leave as it is" and an unknown name is an error."""
        given = {key: value for key, value in overrides.items() if value is not None}
        return type(self).from_dict({**self.to_dict(), **given}, source="override")


def _checked(field: dataclasses.Field, value: Any, source: str) -> Any:
    """`value` as the field has it. Raises `MechintError` if it is of another kind."""
    try:
        return _fitted(field.type, value)
    except TypeError:
        raise MechintError(f"{source}: {field.name} should be {_described(field.type)}, found {value!r}") from None


def _fitted(kind: Any, value: Any) -> Any:
    """`value` if it fits the annotation `kind`, TypeError if not. JSON has no tuples or paths, and writes 1.0 as 1."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _fitted(options[0], value)
    if origin in (types.UnionType, typing.Union):
        for option in options:
            with contextlib.suppress(TypeError):
                return _fitted(option, value)
        raise TypeError
    if origin is Literal and isinstance(value, str) and value in options:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_fitted(options[0], item) for item in value)
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if kind is float:
            return float(value)
        if math.isfinite(value) and value == int(value):
            return int(value)
    if kind in (bool, str, types.NoneType) and isinstance(value, kind):
        return value
    raise TypeError


def _described(kind: Any) -> str:
    """The annotation `kind` in words, for an error."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _described(options[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_described, options))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, options))
    if origin is tuple:
        return "a list"
    return {types.NoneType: "null", Path: "a path"}.get(kind) or f"of type {kind.__name__}"


def require(condition: bool, message: str) -> None:
    """Raise `MechintError(message)` unless `condition`."""
    if not condition:
        raise MechintError(message)


# The original pipeline's settings, where ours differ. Used by `--preset mech-int`, and for a config.json that was
# written before these keys existed.
ORIGINAL_KEYS = {"activation_dim", "epochs", "l1_lambda", "legacy_layout", "max_chars", "model_source", "num_texts"}
COLLECT_PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "mech-int": {"processing": "centred", "prepend_bos": True, "keep_bos": True},
}
TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "mech-int": {"split_by": "row", "batch_order": "torch"},
}


@dataclass(frozen=True)
class CollectConfig(Config):
    """Collect the activations at one hook of a language model over a text source."""

    model: Annotated[str, arg(aliases=["--model-name"])] = "pythia-70m"
    """Hub id, alias such as pythia-70m, local folder, or builtin/pythia-tiny."""
    hook: Annotated[str, arg(aliases=["--hook-name"])] = DEFAULT_HOOK
    """Where to read, in TransformerLens's naming; the layer follows from it."""
    layer: int | None = None
    """Only checked against the hook: a layer that contradicts it is an error."""
    dataset: Annotated[str, arg(aliases=["--dataset-name"])] = "openwebtext"
    """Hub data set, a .txt, .jsonl or .parquet file, a folder or glob of them, or builtin/tales."""
    split: str = "train"
    """Split of the data set (builtin/tales has train and heldout)."""
    revision: str | None = None
    """Commit or tag of the Hub data set; the newest if not given."""
    model_revision: str | None = None
    """Commit or tag of the Hub model; the newest if not given."""
    text_field: str = "text"
    """Column or JSON key that holds the text."""
    num_texts: int = 50_000
    """Texts to read; fewer if the source ends earlier."""
    max_chars: int = 512
    """Characters kept of each text, before tokenisation."""
    context_size: int | None = None
    """Most tokens a text, BOS included; longer texts are cut. The model's own limit if not given."""
    output: Path = Path("activations/activations_50000.pt")
    """A path ending in .pt gives one float32 tensor with its .json sidecar; any other path a sharded store."""
    processing: Processing = "raw"
    """raw: the residual stream as the model computes it. centred: minus its mean over d_model (mech-int's setting)."""
    prepend_bos: bool = True
    """Put the beginning-of-sequence token before each text."""
    keep_bos: bool = False
    """Keep the BOS rows in the store; they have a huge norm in real models and are left out by default."""
    preset: Literal["none", "mech-int"] = "none"
    """mech-int: centred, BOS prepended and kept, as the original pipeline collected."""
    batch_size: int = 32
    """Texts through the model at once; like lengths are batched together."""
    checkpoint_every: int = 512
    """Texts a shard: each finished shard is where a killed collection goes on from. 0 means 512."""
    dtype: Dtype = "float32"
    """Number format of the model and of a sharded store. bfloat16 is faster and lossy; a .pt is always float32."""
    backend: Backend = "auto"
    """transformers: plain hooks (fast; residual-stream hooks). bridge: TransformerLens (all hooks). auto picks."""
    device: str | None = None
    """cuda, mps or cpu; the best that works if not given."""
    seed: int = 42
    """Seed of the built-in text source."""

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, source: str = "config") -> "CollectConfig":
        """As `Config.from_dict`; a preset gives its settings where the values do not."""
        preset = values.get("preset", "none")
        if preset not in COLLECT_PRESETS:
            raise MechintError(f"{source}: unknown preset {preset!r}; {nearest(str(preset), COLLECT_PRESETS)}")
        return super().from_dict({**COLLECT_PRESETS[preset], **values}, source=source)

    def __post_init__(self) -> None:
        require(self.num_texts > 0, f"--num-texts must be at least 1, got {self.num_texts}")
        require(self.max_chars > 0, f"--max-chars must be at least 1, got {self.max_chars}")
        require(self.batch_size > 0, f"--batch-size must be at least 1, got {self.batch_size}")
        require(self.checkpoint_every >= 0, f"--checkpoint-every must not be negative, got {self.checkpoint_every}")
        require(self.context_size is None or self.context_size > 1, "--context-size must be at least 2")

    @property
    def texts_per_shard(self) -> int:
        return self.checkpoint_every or 512


@dataclass(frozen=True)
class SAETrainConfig(Config):
    """Train the canonical sparse autoencoder: ReLU, L1, decoder rows renormalised after each step."""

    activations_path: str = "activations/activations_50000.pt"
    """What to train on: a store folder, or a .pt tensor."""
    activation_dim: Annotated[int, arg(aliases=["--d-in"])] = 512
    """Width of the activations, d_in; taken from the activations if not given."""
    expansion: int = 8
    """Latents per input dimension: d_sae = expansion * d_in."""
    l1_lambda: Annotated[float, arg(aliases=["--lam", "--l1-coefficient"])] = 3.0
    """Weight of the mean of |f| over batch and latents, beside the mean squared error per dimension."""
    epochs: Annotated[int, arg(aliases=["--steps"])] = 50_000
    """Optimiser steps, one random batch each (called epochs for historical reasons)."""
    learning_rate: Annotated[float, arg(aliases=["--lr"])] = 3e-4
    """Peak learning rate of Adam."""
    batch_size: int = 4096
    """Activation vectors a step."""
    warmup_steps: int = 2000
    """Steps over which the learning rate rises linearly from 0; a cosine to 0 follows."""
    lambda_warmup_steps: int = 5000
    """Steps over which the L1 weight rises linearly from 0; 0 means constant."""
    max_grad_norm: float = 1.0
    """Total gradient norm is clipped to this before each step."""
    val_fraction: float = 0.05
    """Share held out for validation."""
    seed: int = 42
    """Seed of initial weights, split and batches."""
    eval_batch_size: int = 8192
    """Vectors at once during evaluation."""
    split_by: Literal["text", "row"] = "text"
    """What is held out: whole texts, or single rows as the original did (rows of one text then land on both sides)."""
    batch_order: Literal["counter", "torch"] = "counter"
    """counter: the batch of step t depends on seed and t alone. torch: the original's sequential generator."""
    preset: Literal["none", "mech-int"] = "none"
    """mech-int: row split and sequential batches, so that the original's numbers can be reproduced."""
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
    model_name: str = "pythia-70m"
    """Recorded; taken from the activations when they say."""
    model_source: str = "EleutherAI/pythia-70m"
    """Recorded; taken from the activations when they say."""
    layer: int = 3
    """Recorded; follows from the hook."""
    hook_name: Annotated[str, arg(aliases=["--hook"])] = DEFAULT_HOOK
    """Recorded; taken from the activations when they say, and then a different value is an error."""
    dataset_name: Annotated[str, arg(aliases=["--dataset"])] = "openwebtext"
    """Recorded; taken from the activations when they say."""
    dataset_split: str = "train"
    """Recorded; taken from the activations when they say."""
    num_texts: int = 50_000
    """Recorded; taken from the activations when they say."""
    max_chars: int = 512
    """Recorded; taken from the activations when they say."""

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
        return super().from_dict({**TRAIN_PRESETS[preset], "preset": preset, **values}, source=source)

    def __post_init__(self) -> None:
        for name in ("activation_dim", "expansion", "epochs", "batch_size", "eval_batch_size"):
            value = getattr(self, name)
            require(value > 0, f"--{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("l1_lambda", "warmup_steps", "lambda_warmup_steps", "save_every", "log_every"):
            value = getattr(self, name)
            require(value >= 0, f"--{name.replace('_', '-')} must not be negative, got {value}")
        for name in ("l1_lambda", "learning_rate"):
            require(math.isfinite(getattr(self, name)), f"--{name.replace('_', '-')} must be a finite number")
        require(self.learning_rate > 0, f"--learning-rate must be above 0, got {self.learning_rate}")
        require(0 <= self.seed < 2**63, f"--seed must be at least 0 and below 2**63, got {self.seed}")
        require(self.max_grad_norm > 0, f"--max-grad-norm must be above 0, got {self.max_grad_norm}")
        require(
            0 <= self.val_fraction < 1,
            f"--val-fraction is the share held out, 0 <= share < 1, got {self.val_fraction:g}: nothing would be left"
            " to train on",
        )
        if self.run_name is not None:
            check_run_name(self.run_name)

    @property
    def num_features(self) -> int:
        """d_sae, under its old name."""
        return self.activation_dim * self.expansion

    @property
    def d_sae(self) -> int:
        return self.num_features

    @property
    def steps(self) -> int:
        return self.epochs


def check_run_name(name: str) -> None:
    """Raise `MechintError` unless `name` is one plain folder name."""
    plain = bool(name) and not set(name) & set("/\\\0") and name not in (".", "..") and not name.startswith(".")
    require(
        plain,
        f"run name {name!r} must be one folder name without '/', '\\', '..' or a leading dot:"
        " use --runs-root for the folder around it",
    )


def layer_of_hook(hook_name: str) -> int | None:
    """The layer in a hook name such as `blocks.3.hook_resid_post`; None for hooks outside the blocks."""
    parts = hook_name.split(".")
    if len(parts) >= 3 and parts[0] == "blocks" and parts[1].isdigit():
        return int(parts[1])
    return None


@dataclass(frozen=True)
class EvalConfig(Config):
    """Evaluate an SAE: reconstruction and sparsity on held-out activations, and what splicing it in costs the model."""

    run_dir: Path | None = None
    """A run directory; wins over --checkpoint and --config."""
    checkpoint: Path | None = None
    """A checkpoint.pt, an old saved_models/*.pt, or a folder in SAELens's layout."""
    config: Path | None = None
    """config.json that belongs to the checkpoint; found beside it if not given, else the original's defaults."""
    activations_path: str | None = None
    """Activations to evaluate on, split as the config says; those of the config if not given."""
    rows: Literal["heldout", "all"] = "heldout"
    """Rows to measure on: those that the run held out, or all (for activations that the SAE was not trained on)."""
    output: Path | None = None
    """Also write the results to this JSON file."""
    overwrite: bool = False
    """Replace --output if it exists."""
    eval_texts_path: Path | None = None
    """Texts, one a line, for the cross-entropy; the held-out texts of the activations if not given."""
    max_eval_texts: int = 200
    """Most texts for the cross-entropy, from the first on; 0 leaves it out."""
    model: str | None = None
    """Language model for the cross-entropy; the one that the activations name if not given."""
    backend: Backend = "auto"
    """How to run the model, as in collect."""
    batch_size: int = 16
    """Texts through the model at once."""
    device: str | None = None
    """cuda, mps or cpu; the best that works if not given."""


@dataclass(frozen=True)
class AblateConfig(Config):
    """Rank latents by what removing each one does to the model's predictions (KL of clean to ablated)."""

    checkpoint: Path
    """A checkpoint.pt, an old saved_models/*.pt, or a folder in SAELens's layout."""
    eval_texts_path: Path
    """Texts, one a line; blank lines are dropped."""
    output: Path
    """CSV to write, sorted by mean_kl."""
    config: Path | None = None
    """config.json that belongs to the checkpoint; found beside it if not given."""
    feature_subset: str | None = None
    """Latents to ablate, such as 1,2,3 or 0-99,512; all if not given."""
    model: str | None = None
    """Language model; the one that the run names if not given."""
    hook: Annotated[str | None, arg(aliases=["--hook-name"])] = None
    """Hook to ablate at, for an SAE that does not say; only checked for one that does."""
    processing: Processing | None = None
    """As in collect, for an SAE that does not say; only checked for one that does."""
    prepend_bos: bool | None = None
    """As in collect; the SAE's own setting if not given."""
    context_size: int | None = None
    """Most tokens a text, BOS included; the model's own limit if not given."""
    batch_size: int = 128
    """(latent, text) pairs run at once."""
    overwrite: bool = False
    """Replace --output if it exists."""
    device: str | None = None
    """cuda, mps or cpu; the best that works if not given."""


@dataclass(frozen=True)
class CompareConfig(Config):
    """Match the latents of consecutive checkpoints by the cosine of their decoder directions."""

    checkpoints: tuple[Path, ...]
    """Two or more checkpoints; each is compared with the next."""
    output: Path
    """CSV to write."""
    overwrite: bool = False
    """Replace --output if it exists."""
    activation_dim: Annotated[int | None, arg(aliases=["--d-in"])] = None
    """Width that the checkpoints must have; only checked."""
    block_size: int = 1024
    """Latents compared at once; bounds the memory."""
