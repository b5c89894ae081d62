"""Settings of `collect_activations.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from mechint.config.base import DEFAULT_HOOK, Backend, Config, DeviceMap, Dtype, Processing, require
from mechint.errors import MechintError, nearest

COLLECT_PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # the original pipeline's settings, where ours differ
    "mech-int": {"processing": "centred", "prepend_bos": True, "keep_bos": True},
}


@dataclass(frozen=True)
class CollectConfig(Config):
    """Collect the activations at one hook of a language model over a text source."""

    model: Annotated[str, arg(aliases=["--model-name"])] = "pythia-70m"
    """Hub id, alias such as pythia-70m, local folder, .gguf file, or builtin/pythia-tiny."""
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
    """raw: the residual stream as the model computes it. centred: minus its mean over d_model (mech-int's setting), for
    models whose norms subtract it."""
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
    """Number format of the model and of a sharded store. bfloat16 is faster and lossy; a .pt is always float32. int8:
    linear layers in 8 bits (needs bitsandbytes), activations in bfloat16."""
    backend: Backend = "auto"
    """transformers: plain hooks (fast; residual stream, attention's and the MLP's output). bridge: TransformerLens (all
    hooks). auto picks."""
    device: str | None = None
    """cuda, mps or cpu; the best that works if not given."""
    device_map: DeviceMap | None = None
    """auto spreads a model that no device can hold over all devices, memory and disk (needs accelerate)."""
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
