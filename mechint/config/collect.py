"""Settings of `collect_activations.py`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from mechint.config.base import (
    DEFAULT_HOOK,
    TEXT_FIELD,
    Backend,
    Config,
    DeviceMap,
    Dtype,
    Processing,
    Unit,
    Unsaid,
    layer_of_hook,
    require,
)
from mechint.errors import MechintError, nearest

COLLECT_PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # the original pipeline's settings, where ours differ
    "mech-int": {"processing": "centred", "prepend_bos": True, "keep_bos": True},
}


@dataclass(frozen=True)
class CollectConfig(Config):
    """Collect the activations at one hook of a language model, or at several in one pass, over a text source."""

    model: Annotated[str, arg(aliases=["--model-name"])] = "pythia-70m"
    """Hub id, alias such as pythia-70m, local folder, .gguf file, or builtin/pythia-tiny."""
    hook: Annotated[str | tuple[str, ...], arg(aliases=["--hook-name"], metavar="HOOK [HOOK ...]")] = Unsaid(
        DEFAULT_HOOK
    )
    """Where to read, in TransformerLens's naming. Several are read in one pass, each into a store of its own."""
    layer: int | None = None
    """Read that layer's hook_resid_post. Beside --hook it is only checked: a contradiction is an error."""
    layers: str | None = None
    """Read hook_resid_post of several layers in one pass, such as 0-5 or 0,2,4."""
    dataset: Annotated[str, arg(aliases=["--dataset-name"])] = "openwebtext"
    """Hub data set; a .txt, .jsonl, .json, .csv or .parquet file (.gz, .zst too), a folder or glob of them, or one that
    save_to_disk wrote; or builtin/tales."""
    split: str = "train"
    """Split of the data set (builtin/tales has train and heldout; files have none)."""
    revision: str | None = None
    """Commit or tag of the Hub data set; the newest if not given."""
    model_revision: str | None = None
    """Commit or tag of the Hub model; the newest if not given."""
    text_field: str = TEXT_FIELD
    """Column or JSON key that holds the text, a chat or token ids; dots reach into nested ones (messages.content)."""
    unit: Unit | None = None
    """What one text is: a line or file of .txt, a record of the rest. Not given: a folder's .txt files are one each, a
    single .txt is one a line."""
    num_texts: int = 50_000
    """Texts to read; fewer if the source ends earlier."""
    max_chars: int = 512
    """Characters kept of each text, before tokenisation; 0 keeps all."""
    context_size: int | None = None
    """Most tokens read at once, BOS included; longer texts become windows. The model's own limit if not given."""
    bos_every_window: bool = True
    """Begin the later windows of a long text with BOS, too."""
    pack: bool = False
    """Fill each context with several texts, each begun by BOS (or EOS); a token then attends to the texts before its
    own."""
    output: Path = Path("activations/activations_50000.pt")
    """X.pt: one float32 tensor with its .json sidecar. Else a sharded store; for several hooks, a folder of stores."""
    processing: Processing = "raw"
    """raw: the residual stream as the model computes it. centred: minus its mean over d_model (mech-int's setting), for
    models whose norms subtract it."""
    prepend_bos: bool = True
    """Put the beginning-of-sequence token before each text."""
    keep_bos: bool = False
    """Keep the BOS rows in the store; they have a huge norm in real models and are left out by default."""
    preset: Literal["none", "mech-int"] = "none"
    """mech-int: centred, BOS prepended and kept, as the original pipeline collected."""
    batch_size: int | None = None
    """Texts through the model at once, like lengths together; if not given, as many as fill the device."""
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

    def to_dict(self) -> dict[str, Any]:
        """As `Config.to_dict`, with the hooks that --layer and --layers stand for."""
        values = super().to_dict()
        if self.layers is not None or self.layer is not None:
            hooks = list(self.hooks)
            values |= {"hook": hooks[0] if len(hooks) == 1 else hooks, "layer": None, "layers": None}
        return values

    def __post_init__(self) -> None:
        require(self.num_texts > 0, f"--num-texts must be at least 1, got {self.num_texts}")
        require(self.max_chars >= 0, f"--max-chars must not be negative, got {self.max_chars}")
        require(
            self.batch_size is None or self.batch_size > 0, f"--batch-size must be at least 1, got {self.batch_size}"
        )
        require(self.checkpoint_every >= 0, f"--checkpoint-every must not be negative, got {self.checkpoint_every}")
        require(self.context_size is None or self.context_size > 1, "--context-size must be at least 2")
        self._check_hooks()

    def _check_hooks(self) -> None:
        said = not isinstance(self.hook, Unsaid)
        if self.layers is not None and (said or self.layer is not None):
            other = "--hook" if said else "--layer"
            raise MechintError(f"--layers {self.layers} and {other} both say where to read: give one of them")
        hooks = self.hooks
        require(bool(hooks) and all(hooks), "--hook needs at least one name, such as blocks.3.hook_resid_post")
        require(len(set(hooks)) == len(hooks), f"a hook is asked for twice in {', '.join(hooks)}: name each one once")
        for hook in hooks:
            layer = layer_of_hook(hook)
            if self.layer not in (None, layer):
                where = f"which is in layer {layer}" if layer is not None else "which is in no layer"
                raise MechintError(f"--layer {self.layer} contradicts --hook {hook}, {where}: give only --hook")
        if len(hooks) > 1 and self.output.suffix == ".pt":
            raise MechintError(
                f"--output {self.output}: a .pt holds the vectors of one hook, and {len(hooks)} are asked for; give a"
                f" folder, as in --output {self.output.with_suffix('')}"
            )

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks to read, from --hook, --layer and --layers."""
        if self.layers is not None:
            return tuple(f"blocks.{layer}.hook_resid_post" for layer in layer_numbers(self.layers))
        if self.layer is not None and isinstance(self.hook, Unsaid):
            return (f"blocks.{self.layer}.hook_resid_post",)
        return (self.hook,) if isinstance(self.hook, str) else self.hook

    def for_training(self) -> dict[str, Any]:
        """The settings of a training straight from the model: `live` of `SAETrainConfig`, which has the rest itself."""
        own = ("output", "preset", "batch_size", "device", "layer", "layers")
        return {name: value for name, value in self.to_dict().items() if name not in own}

    @property
    def texts_per_shard(self) -> int:
        return self.checkpoint_every or 512


def layer_numbers(text: str) -> list[int]:
    """`0-2,5` as [0, 1, 2, 5]. Raises `MechintError` for anything else."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise MechintError(f"--layers {text!r}: expected numbers and ranges such as 0-5 or 0,2,4")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return numbers
