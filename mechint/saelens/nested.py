"""The `sae=` and `logger=` of a `LanguageModelSAERunnerConfig` in SAELens 6's form: one dataclass an architecture."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mechint.errors import MechintError, nearest


@dataclass
class TrainingSAEConfig:
    """What the nested forms share."""

    d_in: int
    d_sae: int
    dtype: str = "float32"
    device: str = "cpu"
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    metadata: dict[str, Any] = field(default_factory=dict)
    decoder_init_norm: float | int | None = 0.1


@dataclass
class StandardTrainingSAEConfig(TrainingSAEConfig):
    """ReLU with an L1 that is weighed by the norms of the decoder rows."""

    l1_coefficient: float | int = 1.0
    lp_norm: float | int = 1.0
    l1_warm_up_steps: int = 0


@dataclass
class GatedTrainingSAEConfig(TrainingSAEConfig):
    """Gate and magnitude; the L1 is on the gate."""

    l1_coefficient: float | int = 1.0
    l1_warm_up_steps: int = 0


@dataclass
class TopKTrainingSAEConfig(TrainingSAEConfig):
    """The k largest of each vector."""

    k: float | int = 100
    use_sparse_activations: bool = True
    aux_loss_coefficient: float | int = 1.0
    rescale_acts_by_decoder_norm: bool = True


@dataclass
class BatchTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """The k largest a vector on average over a batch."""

    topk_threshold_lr: float | int = 0.01


@dataclass
class MatryoshkaBatchTopKTrainingSAEConfig(BatchTopKTrainingSAEConfig):
    """BatchTopK with nested prefixes."""

    matryoshka_widths: list[int] = field(default_factory=list)
    use_matryoshka_aux_loss: bool = False


@dataclass
class JumpReLUTrainingSAEConfig(TrainingSAEConfig):
    """A learned threshold for each latent."""

    jumprelu_init_threshold: float | int = 0.01
    jumprelu_bandwidth: float | int = 0.05
    jumprelu_sparsity_loss_mode: str = "step"
    l0_coefficient: float | int = 1.0
    l0_warm_up_steps: int = 0
    pre_act_loss_coefficient: float | int | None = None
    jumprelu_tanh_scale: float | int = 4.0
    jumprelu_ste_to_input: bool = False
    target_l0: float | int | None = None


NESTED: dict[str, type[TrainingSAEConfig]] = {
    "standard": StandardTrainingSAEConfig,
    "gated": GatedTrainingSAEConfig,
    "topk": TopKTrainingSAEConfig,
    "batchtopk": BatchTopKTrainingSAEConfig,
    "matryoshka_batchtopk": MatryoshkaBatchTopKTrainingSAEConfig,
    "jumprelu": JumpReLUTrainingSAEConfig,
}


def nested_from_dict(values: dict[str, Any]) -> TrainingSAEConfig:
    """`sae=` from a dictionary with `architecture` and the fields of its config."""
    name = str(values.get("architecture", "standard"))
    if name not in NESTED:
        raise MechintError(f"unknown architecture {name!r}; {nearest(name, NESTED)}")
    known = [part.name for part in reversed(dataclasses.fields(NESTED[name]))]  # its own before what all have
    for key in values:
        if key != "architecture" and key not in known:
            raise MechintError(f"{NESTED[name].__name__} has no {key!r}; {nearest(key, known)}")
    return NESTED[name](**{key: value for key, value in values.items() if key != "architecture"})


def our_settings(sae: TrainingSAEConfig) -> dict[str, Any]:
    """What `SAETrainConfig` gets of it."""
    values: dict[str, Any] = {
        "decoder": "free",
        "init": "tied",
        "init_decoder_norm": 1.0 if sae.decoder_init_norm is None else sae.decoder_init_norm,
        "normalize_inputs": our_normalization(sae.normalize_activations),
    }
    if isinstance(sae, (StandardTrainingSAEConfig, GatedTrainingSAEConfig)):
        values |= {"l1_lambda": sae.l1_coefficient, "lambda_warmup_steps": sae.l1_warm_up_steps}
    if isinstance(sae, TopKTrainingSAEConfig):
        values["k"] = float(sae.k)
        if sae.aux_loss_coefficient:
            values |= {"revive": "auxk", "aux_coefficient": sae.aux_loss_coefficient / 32}
    if isinstance(sae, MatryoshkaBatchTopKTrainingSAEConfig) and sae.matryoshka_widths:
        values["widths"] = sorted({*sae.matryoshka_widths, sae.d_sae})
    if isinstance(sae, JumpReLUTrainingSAEConfig):
        values |= {
            "l1_lambda": sae.l0_coefficient,
            "lambda_warmup_steps": sae.l0_warm_up_steps,
            "init_threshold": sae.jumprelu_init_threshold,
            "bandwidth": sae.jumprelu_bandwidth,
            "penalty": sae.jumprelu_sparsity_loss_mode,
            "ste_to_input": sae.jumprelu_ste_to_input,
            "pre_act_coefficient": sae.pre_act_loss_coefficient or 0.0,
        }
        if sae.jumprelu_sparsity_loss_mode == "tanh":
            values["tanh_scale"] = sae.jumprelu_tanh_scale
        if sae.target_l0 is not None:
            values["target_l0"] = sae.target_l0
    return values


def our_normalization(name: str) -> str:
    """`normalize_inputs` for a `normalize_activations`. Raises `MechintError` for one that is not trained here."""
    found = {"none": "none", "expected_average_only_in": "mean-norm"}.get(name)
    if found is None:
        raise MechintError(f"normalize_activations {name!r} is not trained here; valid: none, expected_average_only_in")
    return found


# --- logger= ----------------------------------------------------------------------------------------------------------

# What SAELens can also send to wandb; the flat form has no fields for it, and nothing of it is sent from here.
MORE_IN_WANDB = ("log_activations_store_to_wandb", "log_optimizer_state_to_wandb", "log_weights_to_wandb")


@dataclass
class LoggingConfig:
    """Where the rows of metrics.csv go too. Nothing is sent anywhere unless `log_to_wandb` says so."""

    log_to_wandb: bool = False
    log_activations_store_to_wandb: bool = False
    log_optimizer_state_to_wandb: bool = False
    log_weights_to_wandb: bool = False
    wandb_project: str | None = None
    wandb_id: str | None = None
    run_name: str | None = None
    wandb_entity: str | None = None
    wandb_log_frequency: int = 10
    eval_every_n_wandb_logs: int = 100


def logging_from_dict(values: dict[str, Any]) -> LoggingConfig:
    """`logger=` from a dictionary of its fields."""
    known = [part.name for part in dataclasses.fields(LoggingConfig)]
    for key in values:
        if key not in known:
            raise MechintError(f"LoggingConfig has no {key!r}; {nearest(key, known)}")
    return LoggingConfig(**values)
