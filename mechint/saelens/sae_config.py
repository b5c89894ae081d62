"""`sae.cfg`: what an SAE is and what it was trained on, under the names of SAELens 6 and of the versions before it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

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
    """The name of an architecture. `cfg.architecture` was a string and is a method in SAELens 6: this is both."""

    def __call__(self) -> str:
        return str(self)


@dataclass
class SAEConfig:
    """What defines an SAE beside its weights.

    `model_name`, `hook_name`, `hook_name_out`, `hook_layer`, `context_size`, `prepend_bos`, `dataset_path`,
    `neuronpedia_id`, `activation_fn_str` and `activation_fn_kwargs` are attributes as well; they are read from
    `metadata` and the architecture.
    """

    d_in: int
    d_sae: int
    architecture: str = "standard"  # an `Architecture`, whatever is given
    dtype: str = "float32"
    device: str = "cpu"
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    k: int | None = None
    rescale_acts_by_decoder_norm: bool = False
    d_out: int | None = None  # of transcoders: the width of what they write
    metadata: SAEMetadata = field(default_factory=SAEMetadata)

    def __post_init__(self) -> None:
        self.architecture = Architecture(self.architecture)
        if self.is_transcoder:  # which cannot subtract a b_dec of another width
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
    def activation_fn_str(self) -> str:
        """relu or topk; JumpReLU and gated SAEs were "relu" with more around it."""
        return "topk" if self.architecture.startswith("topk") else "relu"

    @property
    def activation_fn_kwargs(self) -> dict[str, Any]:
        return {} if self.k is None else {"k": self.k}

    def to_dict(self) -> dict[str, Any]:
        """JSON values as in cfg.json; keys that only topk or only transcoders have are left out of the others."""
        values = {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
        if not self.architecture.startswith("topk"):
            del values["k"], values["rescale_acts_by_decoder_norm"]
        if not self.is_transcoder:
            del values["d_out"]
        return {**values, "architecture": str(self.architecture), "metadata": self.metadata.to_dict()}

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
