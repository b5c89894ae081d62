"""`sae.cfg`: what an SAE is and what it was trained on, under the names of SAELens 6 and of the versions before it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from mechint.errors import MechintError, nearest

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# SAELens's names of what is done to each input vector: nothing, scaling to norm sqrt(d_in), layer norm without weights.
NORMALIZE = ("none", "constant_norm_rescale", "layer_norm")
# Keys that older versions had on the cfg itself; 6 keeps them in `metadata`.
_IN_METADATA = (
    "model_name",
    "hook_name",
    "hook_name_out",
    "hook_head_index",
    "seqpos_slice",
    "context_size",
    "prepend_bos",
    "dataset_path",
    "neuronpedia_id",
    "model_from_pretrained_kwargs",
    "sae_lens_training_version",
)


class SAEMetadata(dict[str, Any]):
    """A dictionary whose keys are attributes too; what is not there is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for methods that a dictionary may lack
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


class Architecture(str):
    """The name of an architecture. `cfg.architecture` was a string and is a method in SAELens 6: this is both.

    A transcoder's is that of its activation function and then `transcoder` or, with a skip connection,
    `skip_transcoder`: `transcoder` (ReLU), `jumprelu_transcoder`, `topk_skip_transcoder`, ...
    """

    def __call__(self) -> str:
        return str(self)

    @classmethod
    def of_transcoder(cls, base: str, *, skip: bool) -> "Architecture":
        return cls(("" if base == "standard" else f"{base}_") + ("skip_transcoder" if skip else "transcoder"))


@dataclass
class SAEConfig:
    """What defines an SAE beside its weights.

    `model_name`, `hook_name`, `hook_name_out`, `hook_layer`, `context_size`, `prepend_bos`, `dataset_path`,
    `neuronpedia_id`, `activation_fn_str` and `activation_fn_kwargs` are attributes as well; they are read from
    `metadata` and the architecture.

    Attributes:
        apply_b_dec_to_input: whether `b_dec` is subtracted before encoding. Never in transcoders, whose `b_dec` is of
            another place.
        normalize_activations: what is done to each input vector, one of `NORMALIZE`.
        input_scale: a constant that inputs are multiplied by, and reconstructions divided by.
        reshape_activations: `hook_z` where the SAE is of all heads of a hook at once, laid side by side.
        rescale_acts_by_decoder_norm: topk only: pre-activations are multiplied by the norms of their decoder rows
            before the choice, and divided by them again before decoding.
        d_out: the width of what a transcoder writes; None for others.
        options: what else the architecture has (docs/extend.md), by name.
    """

    d_in: int
    d_sae: int
    architecture: str = "standard"  # an `Architecture`, whatever is given
    dtype: str = "float32"
    device: str = "cpu"
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    k: int | float | None = None
    rescale_acts_by_decoder_norm: bool = False
    d_out: int | None = None
    input_scale: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    metadata: SAEMetadata = field(default_factory=SAEMetadata)

    def __post_init__(self) -> None:
        self.architecture = Architecture(self.architecture)
        if self.is_transcoder:
            self.apply_b_dec_to_input = False
        self.metadata = SAEMetadata(self.metadata)

    def __getattr__(self, name: str) -> Any:
        if name in _IN_METADATA:
            return self.metadata.get(name)
        raise AttributeError(f"SAEConfig has no {name!r}; what an SAE was trained on is in cfg.metadata")

    @property
    def hook_layer(self) -> int | None:
        """The layer in the hook's name."""
        from mechint.config import layer_of_hook  # with it come the settings of all commands: not to open an SAE

        return layer_of_hook(self.metadata.get("hook_name") or "")

    @property
    def is_transcoder(self) -> bool:
        """Whether it reads one hook (`hook_name`) and writes another (`hook_name_out`)."""
        return self.architecture.endswith("transcoder")

    @property
    def has_skip(self) -> bool:
        """Whether a transcoder adds its input, times `W_skip`, to what it writes."""
        return self.architecture.endswith("skip_transcoder")

    @property
    def base_architecture(self) -> str:
        """The activation function, and the class that computes it."""
        if not self.is_transcoder:
            return str(self.architecture)
        return self.architecture.removesuffix("transcoder").removesuffix("skip_").removesuffix("_") or "standard"

    @property
    def activation_fn_str(self) -> str:
        """relu or topk; JumpReLU and gated SAEs were "relu" with more around it."""
        return "topk" if self.architecture.startswith("topk") else "relu"

    @property
    def activation_fn_kwargs(self) -> dict[str, Any]:
        return {} if self.k is None else {"k": self.k}

    def to_dict(self) -> dict[str, Any]:
        """JSON values as in cfg.json; keys that only some SAEs have are left out of the others."""
        values = {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
        options = values.pop("options")
        if not self.architecture.startswith("topk"):
            del values["k"], values["rescale_acts_by_decoder_norm"]
        if not self.is_transcoder:
            del values["d_out"]
        if self.input_scale == 1.0:
            del values["input_scale"]
        return {**values, **options, "architecture": str(self.architecture), "metadata": self.metadata.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SAEConfig":
        """From `to_dict` or a cfg.json; keys of older versions go where 6 has them, others into `metadata`."""
        known = {part.name for part in dataclasses.fields(cls)}
        metadata = {**(values.get("metadata") or {})}
        metadata |= {
            key: value for key, value in values.items() if key not in known and not key.startswith("activation")
        }
        given = {key: value for key, value in values.items() if key in known and key != "metadata"}
        kwargs = values.get("activation_fn_kwargs") or {}
        if values.get("activation_fn_str", values.get("activation_fn")) == "topk" and "k" in kwargs:
            given |= {"architecture": "topk", "k": kwargs["k"]}
        return cls(**given, metadata=SAEMetadata(metadata))


def dtype_of(name: str | torch.dtype | None) -> torch.dtype:
    """A torch dtype from its name, with or without "torch.". float32 for None."""
    if isinstance(name, torch.dtype):
        return name
    plain = (name or "float32").removeprefix("torch.")
    if plain not in DTYPES:
        raise MechintError(f"dtype {name!r} is not known; {nearest(plain, DTYPES)}")
    return DTYPES[plain]


def reshape_activations(metadata: dict[str, Any]) -> str:
    """`hook_z` for an SAE of all heads of a hook on single heads: SAELens is given those one by one, and lays them side
    by side only where cfg.json says so. Else `none`."""
    heads = str(metadata.get("hook_name")).endswith("hook_z") and metadata.get("hook_head_index") is None
    return str(metadata.get("reshape_activations", "hook_z" if heads else "none"))
