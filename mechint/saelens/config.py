"""`LanguageModelSAERunnerConfig`: a training in SAELens's words, flat as before version 6 or nested as in 6.

It is translated, not imitated: `collect_config` and `train_config` are what our own commands get, and `notes` says in
words where a setting means something else here or nothing.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mechint.config import CollectConfig, SAETrainConfig, layer_of_hook
from mechint.errors import MechintError, nearest
from mechint.saelens.nested import (
    MORE_IN_WANDB,
    NESTED,
    LoggingConfig,
    TrainingSAEConfig,
    logging_from_dict,
    nested_from_dict,
    our_normalization,
    our_settings,
)

# Characters a token never exceeds on average, so that the cut is made by tokens.
CHARS_A_TOKEN = 16
# The schedules that we have, by their names there.
SCHEDULES = {"constant": "constant", "cosineannealing": "cosine"}


@dataclass
class LanguageModelSAERunnerConfig:
    """A training from a language model to an SAE. All fields may be left out; the defaults are SAELens's, except that
    nothing is sent to wandb.

    Either give `sae=` (one of the `...TrainingSAEConfig`s) and `logger=`, or the flat fields below them.
    docs/saelens.md has a table of what each becomes.

    Raises:
        MechintError: settings that contradict each other, or that no training here has.
    """

    sae: TrainingSAEConfig | dict[str, Any] | None = None

    # model and hook
    model_name: str = "gelu-2l"
    model_class_name: str = "HookedTransformer"
    hook_name: str = "blocks.0.hook_mlp_out"
    hook_layer: int | None = None
    hook_head_index: int | None = None
    hook_eval: str = "NOT_IN_USE"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    model_from_pretrained_kwargs: dict[str, Any] | None = None

    # data
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    streaming: bool = True
    is_dataset_tokenized: bool = False
    use_chat_formatting: bool = False
    context_size: int = 128
    prepend_bos: bool = True
    exclude_special_tokens: bool | list[int] = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    disable_concat_sequences: bool = False
    sequence_separator_token: int | str | None = "bos"
    use_cached_activations: bool = False
    cached_activations_path: str | None = None
    training_tokens: int = 2_000_000
    store_batch_size_prompts: int = 32
    n_batches_in_buffer: int = 20
    train_batch_size_tokens: int = 4096
    activations_mixing_fraction: float | int = 0.5
    n_batches_for_norm_estimate: int = 1000

    # the SAE, flat form
    architecture: str = "standard"
    d_in: int | None = None
    d_sae: int | None = None
    expansion_factor: int | None = None
    activation_fn: str | None = None
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    normalize_activations: str = "none"
    apply_b_dec_to_input: bool = True
    normalize_sae_decoder: bool = True
    init_encoder_as_decoder_transpose: bool = False
    decoder_heuristic_init: bool = False
    decoder_heuristic_init_norm: float | int = 0.1
    scale_sparsity_penalty_by_decoder_norm: bool = False
    b_dec_init_method: str = "zeros"
    from_pretrained_path: str | None = None
    mse_loss_normalization: str | None = None
    noise_factor: float | int = 0.0
    jumprelu_init_threshold: float | int = 0.001
    jumprelu_bandwidth: float | int = 0.001

    # sparsity, flat form
    l1_coefficient: float | int = 1e-3
    lp_norm: float | int = 1.0
    l1_warm_up_steps: int = 0
    use_ghost_grads: bool = False
    feature_sampling_window: int = 2000
    dead_feature_window: int = 1000
    dead_feature_threshold: float | int = 1e-8

    # optimiser
    lr: float | int = 3e-4
    lr_scheduler_name: str = "constant"
    lr_warm_up_steps: int = 0
    lr_end: float | int | None = None
    lr_decay_steps: int = 0
    n_restart_cycles: int = 1
    adam_beta1: float | int = 0.9
    adam_beta2: float | int = 0.999

    # hardware
    device: str | None = "cpu"
    llm_device: str | None = None
    act_store_device: str | None = None
    prefetch_llm_batches: bool | int = False
    dtype: str = "float32"
    autocast: bool = False
    autocast_lm: bool = False
    compile_llm: bool = False
    llm_compilation_mode: str | None = None
    compile_sae: bool = False
    sae_compilation_mode: str | None = None
    seed: int = 42

    # logs and outputs
    logger: LoggingConfig | dict[str, Any] | None = None
    log_to_wandb: bool = False
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_id: str | None = None
    run_name: str | None = None
    wandb_log_frequency: int = 10
    eval_every_n_wandb_logs: int = 100
    n_eval_batches: int = 10
    eval_batch_size_prompts: int | None = None
    n_checkpoints: int = 0
    checkpoint_path: str | None = "checkpoints"
    save_final_checkpoint: bool = False
    output_path: str | None = None
    resume_from_checkpoint: str | None = None
    verbose: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.sae, dict):
            self.sae = nested_from_dict(self.sae)
        if isinstance(self.logger, dict):
            self.logger = logging_from_dict(self.logger)
        self._check()
        self.notes  # noqa: B018  (what cannot be translated is an error now, not after a collection)

    # --- what both forms say, in one place ----------------------------------------------------------------------------

    @property
    def nested(self) -> TrainingSAEConfig | None:
        """`sae`, once a dictionary has become a config; None in the flat form."""
        return self.sae if isinstance(self.sae, TrainingSAEConfig) else None

    @property
    def sae_architecture(self) -> str:
        """The architecture's name, whichever form it is given in."""
        if self.nested is not None:
            return next(name for name, kind in NESTED.items() if type(self.nested) is kind)
        return "topk" if self.activation_fn == "topk" else self.architecture

    @property
    def total_training_steps(self) -> int:
        return self.training_tokens // self.train_batch_size_tokens

    def latents(self, d_in: int) -> int:
        """The number of latents. Raises `MechintError` if a given d_in is another, or d_sae and expansion_factor
        contradict each other."""
        given = self.nested.d_in if self.nested is not None else self.d_in
        if given not in (None, d_in):
            raise MechintError(f"d_in is {given}, but {self.hook_name} of {self.model_name} is {d_in} wide")
        d_sae = self.nested.d_sae if self.nested is not None else self.d_sae
        if d_sae is None:
            return (self.expansion_factor or 4) * d_in  # SAELens's default
        if self.expansion_factor is not None and self.expansion_factor * d_in != d_sae:
            raise MechintError(
                f"d_sae {d_sae} and expansion_factor {self.expansion_factor} contradict each other:"
                f" {self.expansion_factor} times d_in {d_in} is {self.expansion_factor * d_in}; give one of the two"
            )
        return d_sae

    @property
    def buffer_rows(self) -> int:
        """Rows of the buffer that batches are drawn from."""
        return max(2, self.n_batches_in_buffer * self.context_size * (self.store_batch_size_prompts or 32))

    def collect_config(self, output: Any, num_texts: int) -> CollectConfig:
        """What `mechint collect` gets."""
        centred = bool((self.model_from_pretrained_kwargs or {}).get("center_writing_weights"))
        return CollectConfig.from_dict(
            {
                "model": self.model_name,
                "hook": self.hook_name,
                "dataset": self.dataset_path,
                "num_texts": num_texts,
                "max_chars": CHARS_A_TOKEN * self.context_size,
                "context_size": self.context_size,
                "output": str(output),
                "processing": "centred" if centred else "raw",
                "prepend_bos": self.prepend_bos,
                "keep_bos": self.prepend_bos and not self.exclude_special_tokens,
                "batch_size": self.store_batch_size_prompts,
                "dtype": self._dtype,
                "device": self.llm_device or self.device,
                "seed": self.seed,
            },
            source="LanguageModelSAERunnerConfig",
        )

    def train_config(self, activations_path: Any, d_in: int) -> SAETrainConfig:
        """What `mechint train` gets."""
        steps, log = self.total_training_steps, self.log
        values: dict[str, Any] = {
            "activations_path": str(activations_path),
            "activation_dim": d_in,
            "d_sae": self.latents(d_in),
            "architecture": self.sae_architecture,
            "epochs": steps,
            "batch_size": self.train_batch_size_tokens,
            "learning_rate": self.lr,
            "warmup_steps": self.lr_warm_up_steps,
            "schedule": SCHEDULES[self.lr_scheduler_name],
            "decay_share": min(self.lr_decay_steps / steps, 1.0),
            "lambda_warmup_steps": self.l1_warm_up_steps,
            "adam_beta1": self.adam_beta1,
            "adam_beta2": self.adam_beta2,
            "dead_after": self.dead_feature_window * self.train_batch_size_tokens,
            "seed": self.seed,
            "device": self.device,
            "runs_root": self.checkpoint_path or "runs",
            "run_name": log.run_name,
            "save_every": max(steps // (self.n_checkpoints + 1), 1) if self.n_checkpoints else 1000,
            "log_every": log.wandb_log_frequency if log.log_to_wandb else 0,
            "track": "wandb" if log.log_to_wandb else "none",
            "l1_reduction": "sum",
        }
        values |= self._flat_sae() if self.nested is None else our_settings(self.nested)
        config = SAETrainConfig.from_dict(values, source="LanguageModelSAERunnerConfig")
        return config.with_latents(config.num_features)

    @property
    def notes(self) -> tuple[str, ...]:
        """In words, what is done otherwise here than in SAELens."""
        default = {part.name: part.default for part in dataclasses.fields(self)}
        notes = ["one text a window; the first texts are held out, the others are trained on straight from the model"]
        if self.use_ghost_grads:
            notes.append("use_ghost_grads: dead latents are revived by AuxK (Gao et al. 2024) instead")
        if self.exclude_special_tokens:
            notes.append("exclude_special_tokens: rows of BOS are left out, those of other special tokens are not")
        if self.lr_scheduler_name == "cosineannealing":
            notes.append("cosineannealing: the learning rate falls to 0, not to lr_end")
        nothing = (
            "activations_mixing_fraction",
            "feature_sampling_window",
            "dead_feature_threshold",
            "eval_batch_size_prompts",
            "n_batches_for_norm_estimate",
            "disable_concat_sequences",
            "sequence_separator_token",
            "prefetch_llm_batches",
            "compile_llm",
            "compile_sae",
            "autocast",
            "autocast_lm",
            "lr_end",
            "act_store_device",
            "eval_every_n_wandb_logs",
            "save_final_checkpoint",
        )
        unused = [name for name in nothing if getattr(self, name) != default[name]]
        log = self.log
        if log.log_to_wandb:
            unused += [part for part in ("wandb_id", *MORE_IN_WANDB) if getattr(log, part)]
        if self.nested is None and self.decoder_heuristic_init and not self._free:
            unused.append("decoder_heuristic_init (decoder rows have norm 1)")
        if unused:
            notes.append("without effect here: " + ", ".join(unused))
        return tuple(notes)

    @property
    def _dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def log(self) -> LoggingConfig:
        """`logger`, or the flat fields about logs as one."""
        if isinstance(self.logger, LoggingConfig):
            return self.logger
        names = [part.name for part in dataclasses.fields(LoggingConfig) if part.name not in MORE_IN_WANDB]
        return LoggingConfig(**{name: getattr(self, name) for name in names})

    @property
    def _free(self) -> bool:
        """In the flat form: whether decoder rows may have any norm."""
        return self.scale_sparsity_penalty_by_decoder_norm or not self.normalize_sae_decoder

    def _flat_sae(self) -> dict[str, Any]:
        name = self.sae_architecture
        free = self._free
        values: dict[str, Any] = {
            "decoder": "free" if free else "unit",
            "init": "tied" if self.init_encoder_as_decoder_transpose else "xavier",
            "b_dec_init": {"zeros": "zero", "mean": "mean", "geometric_median": "median"}[self.b_dec_init_method],
            "normalize_inputs": our_normalization(self.normalize_activations),
        }
        if free and self.decoder_heuristic_init:
            values["init_decoder_norm"] = self.decoder_heuristic_init_norm
        if name in ("standard", "gated", "jumprelu"):
            values["l1_lambda"] = self.l1_coefficient
        if name == "jumprelu":
            values |= {"init_threshold": self.jumprelu_init_threshold, "bandwidth": self.jumprelu_bandwidth}
        if "topk" in name:
            values["k"] = float(self.activation_fn_kwargs.get("k", 100))
        if self.use_ghost_grads or "topk" in name:
            values["revive"] = "auxk"
        return values

    def _check(self) -> None:
        names = list(NESTED)
        if self.nested is not None and type(self.nested) not in NESTED.values():
            kinds = ", ".join(kind.__name__ for kind in NESTED.values())
            raise MechintError(f"sae={type(self.nested).__name__} is none of {kinds}")
        if self.nested is None and self.architecture not in names:
            raise MechintError(f"unknown architecture {self.architecture!r}; {nearest(self.architecture, names)}")
        if self.activation_fn not in (None, "relu", "topk"):
            raise MechintError(f"activation_fn {self.activation_fn!r} is not trained here; valid: relu, topk")
        if self.activation_fn == "topk" and self.architecture not in ("standard", "topk"):
            raise MechintError(f"activation_fn topk and architecture {self.architecture} contradict each other")
        if self.hook_layer not in (None, layer_of_hook(self.hook_name)):
            raise MechintError(f"hook_layer {self.hook_layer} contradicts hook_name {self.hook_name}: leave it out")
        if self.lr_scheduler_name not in SCHEDULES:
            valid = ", ".join(SCHEDULES)
            raise MechintError(f"lr_scheduler_name {self.lr_scheduler_name!r} is not here; valid: {valid}")
        if self.total_training_steps < 1:
            raise MechintError(
                f"training_tokens {self.training_tokens} is less than one batch of {self.train_batch_size_tokens}"
            )
        if self.b_dec_init_method not in ("zeros", "mean", "geometric_median"):
            raise MechintError(f"b_dec_init_method {self.b_dec_init_method!r}; valid: zeros, mean, geometric_median")
        our_normalization(self.normalize_activations if self.nested is None else self.nested.normalize_activations)
        only = {
            "hook_head_index": None,
            "seqpos_slice": (None,),
            "from_pretrained_path": None,
            "mse_loss_normalization": None,
            "noise_factor": 0.0,
            "use_chat_formatting": False,
            "is_dataset_tokenized": False,
            "model_class_name": "HookedTransformer",
            "n_restart_cycles": 1,
            "model_kwargs": {},
        }
        for name, value in only.items():
            if getattr(self, name) != value:
                raise MechintError(f"{name}={getattr(self, name)!r} is not trained here; leave it at {value!r}")
        lp_norm = getattr(self.nested, "lp_norm", 1.0) if self.nested is not None else self.lp_norm
        subtracted = self.apply_b_dec_to_input if self.nested is None else self.nested.apply_b_dec_to_input
        if lp_norm != 1.0:
            raise MechintError(f"lp_norm {lp_norm} is not trained here; leave it at 1.0 (see also --saturation)")
        if not subtracted:
            raise MechintError("apply_b_dec_to_input=False is not trained here; leave it at True")
        if self.dataset_trust_remote_code:
            raise MechintError("dataset_trust_remote_code: code of data sets is never run here; give a plain data set")
        if self._dtype not in ("float32", "bfloat16", "float16"):
            raise MechintError(f"dtype {self.dtype!r} is not known; valid: float32, bfloat16, float16")
