"""The settings of each command. A field is a flag, its help, a key of config.json and an argument in Python, at once.

A config is a value: nothing is resolved, opened or logged here. Names that the first version of the pipeline used
(`epochs`, `l1_lambda`, `activation_dim`, ...) stay, because old config.json files and scripts use them; the word of the
field is an alias of the flag.
"""

import contextlib
import dataclasses
import math
import re
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import Positional, arg

from mechint.errors import MechintError, nearest
from mechint.provenance import read_json, write_json

# `openwebtext` alone is a data set with a loading script, which datasets >= 4 refuses; this one is plain parquet.
DATASET_ALIASES = {"openwebtext": "Skylion007/openwebtext"}
DEFAULT_HOOK = "blocks.3.hook_resid_post"
TEXT_FIELD = "text"

Processing = Literal["raw", "centred"]
Backend = Literal["auto", "transformers", "bridge"]
Dtype = Literal["float32", "bfloat16", "float16", "int8"]
DeviceMap = Literal["auto"]
Unit = Literal["line", "file", "record"]  # what one text is, in a file of texts


class Unsaid(str):
    """A default that is there for old code to read: nobody said it, so nothing may be recorded as if somebody had."""


class UnsaidInt(int):
    """As `Unsaid`."""


def said(value: Any) -> Any:
    """`value`, or None where it is a default that nobody said."""
    return None if isinstance(value, (Unsaid, UnsaidInt)) else value


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
    def superseded(cls, given: Collection[str], under: dict[str, Any]) -> tuple[str, ...]:
        """The settings of `under` that the `given` ones, which come on top, take the place of beside their own."""
        return ()

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
        return cls(**renamed).canonical()

    @classmethod
    def from_json(cls: type[ConfigT], path: str | Path) -> ConfigT:
        """`from_dict` of a file. Raises `MechintError` if it is missing or broken, too."""
        return cls.from_dict(read_json(path, "config file"), source=str(path))

    def save_json(self, path: str | Path) -> Path:
        """Write `to_dict` as a config.json; its path."""
        write_json(path, self.to_dict())
        return Path(path)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            key: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def canonical(self: ConfigT) -> ConfigT:
        """With hooks under TransformerLens's names where modules of Hugging Face's are named."""
        given = {name: getattr(self, name) for name in ("hook", "hook_name") if hasattr(self, name)}
        renamed = {name: _canonical(value) for name, value in given.items()}
        return self if renamed == given else dataclasses.replace(self, **renamed)

    def with_overrides(self: ConfigT, **overrides: Any) -> ConfigT:
        """A copy with the given fields replaced; None means "leave as it is" and an unknown name is an error."""
        given = {key: value for key, value in overrides.items() if value is not None}
        under = self.to_dict()
        under |= dict.fromkeys(self.superseded(given, under))
        return type(self).from_dict({**under, **given}, source="override")


@dataclass(frozen=True)
class ReadsSAE(Config):
    """What every command that reads an SAE is told of it and of its model; see `mechint.inside`."""

    sae: Annotated[Positional[str | None], arg(metavar="SAE")] = None
    """The SAE: a run directory, a file or folder of any format, a registered name, or user/repo on the Hub."""
    run_dir: Path | None = None
    """In place of SAE: a run directory; wins over --checkpoint and --config."""
    checkpoint: Path | None = None
    """In place of SAE: a checkpoint.pt, an old saved_models/*.pt, or a folder in SAELens's layout."""
    config: Path | None = None
    """config.json that belongs to a checkpoint; found beside it if not given."""
    model: Annotated[str | None, arg(aliases=["--model-name"])] = None
    """Language model; the one that the SAE or its activations name if not given."""
    hook: Annotated[str | None, arg(aliases=["--hook-name", "--hook-site"])] = None
    """Hook of the SAE, for one that does not say; only checked for one that does."""
    processing: Processing | None = None
    """As in collect, for an SAE that does not say; only checked for one that does."""
    dtype: Dtype | None = None
    """Precision of the model; the one that the activations were collected in if not given."""
    device: str | None = None
    """cuda, mps or cpu; the best that works if not given."""
    device_map: DeviceMap | None = None
    """auto spreads a model that no device can hold over all devices, memory and disk (needs accelerate)."""

    @property
    def has_sae(self) -> bool:
        return any(given is not None for given in (self.sae, self.run_dir, self.checkpoint))


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
        # the option that the value already is comes first: of int | float, 1.0 stays a float
        for option in sorted(options, key=lambda option: type(value) is not option):
            with contextlib.suppress(TypeError):
                return _fitted(option, value)
        raise TypeError
    if origin is dict and isinstance(value, dict):
        return value
    if origin is Literal and isinstance(value, str) and value in options:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_fitted(options[0], item) for item in value)
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value).expanduser()
    if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if kind is float:
            return float(value)
        if isinstance(value, int):
            return value
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
    if origin is dict:
        return "an object"
    return {types.NoneType: "null", Path: "a path"}.get(kind) or f"of type {kind.__name__}"


def require(condition: bool, message: str) -> None:
    """Raise `MechintError(message)` unless `condition`."""
    if not condition:
        raise MechintError(message)


def check_run_name(name: str) -> None:
    """Raise `MechintError` unless `name` is one plain folder name."""
    plain = bool(name) and not set(name) & set("/\\\0") and name not in (".", "..") and not name.startswith(".")
    require(
        plain,
        f"run name {name!r} must be one folder name without '/', '\\', '..' or a leading dot:"
        " use --runs-root for the folder around it",
    )


# Hugging Face's names of a block, of its attention and of its MLP; the towers of other modalities have blocks too.
_BLOCK_MODULE = re.compile(r"(?:[A-Za-z_]\w*\.)*?(?:layers|h|blocks|block)\.(\d+)(?:\.(\w+))?")
_OTHER_TOWER = re.compile(r"vision|visual|image|audio|encoder")
_PARTS = {
    **dict.fromkeys(("self_attn", "attn", "attention", "self_attention"), "attn.hook_out"),
    **dict.fromkeys(("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe"), "mlp.hook_out"),
    None: "hook_resid_post",
}


def canonical_hook(name: str) -> str:
    """TransformerLens's name of what a Hugging Face module such as `model.layers.2` or `gpt_neox.layers.3.mlp` gives;
    any other name as it is."""
    match = _BLOCK_MODULE.fullmatch(name)
    if match is None or match[2] not in _PARTS or _OTHER_TOWER.search(name):
        return name
    return f"blocks.{int(match[1])}.{_PARTS[match[2]]}"


def _canonical(given: Any) -> Any:
    if isinstance(given, (list, tuple)):
        return type(given)(map(_canonical, given))
    return canonical_hook(given) if isinstance(given, str) else given


def layer_of_hook(hook_name: str) -> int | None:
    """The layer in a hook name such as `blocks.3.hook_resid_post`; None for hooks outside the blocks."""
    parts = canonical_hook(hook_name).split(".")
    if len(parts) >= 3 and parts[0] == "blocks" and parts[1].isdigit():
        return int(parts[1])
    return None
