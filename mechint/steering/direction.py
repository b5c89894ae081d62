"""A steering direction and its two files: `direction.safetensors` (key `direction`) and its `.json` sidecar."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import safetensors
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from mechint.errors import MechintError
from mechint.models import LanguageModel
from mechint.provenance import atomic_path, read_json, sha256_file, write_json

FILE_NAME = "direction.safetensors"
KEY = "direction"
# How far from 1 the norm of a stored direction may be: float32 rounding, and float16 files of others.
NORM_TOLERANCE = 1e-3


@final
@dataclass(frozen=True)
class Direction:
    """A unit vector at a hook, and what its sidecar says of it.

    Attributes:
        vector: float32, norm 1, on the CPU.
        info: the sidecar; docs/steering.md lists its keys. Empty for a direction that came without one.
    """

    vector: Float[Tensor, " d_in"]
    info: dict[str, Any]

    def __repr__(self) -> str:
        where = f"{self.info.get('hook_site', 'unknown hook')} of {self.info.get('model', 'unknown model')}"
        return f"Direction({self.name!r}, {len(self.vector)} wide, {where})"

    @property
    def name(self) -> str:
        return str(self.info.get("name", "direction"))

    @property
    def d_in(self) -> int:
        return len(self.vector)


def make_direction(raw: Float[Tensor, " d_in"], **info: Any) -> Direction:
    """A direction of unit norm from any vector; `hidden_dim` and `direction_norm` (the norm that `raw` had) are noted.

    Raises:
        MechintError: the vector is zero or not finite, so it has no direction.
    """
    raw = raw.detach().cpu().double()
    norm = float(raw.norm())
    if not math.isfinite(norm) or norm == 0:
        raise MechintError(f"a vector of norm {norm} has no direction: are the two sets of prompts the same?")
    return Direction((raw / norm).float(), {**info, "hidden_dim": len(raw), "direction_norm": norm})


def direction_path(path: str | Path) -> Path:
    """The safetensors file that `path`, a folder or the file itself, means."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def sidecar_path(path: str | Path) -> Path:
    """The sidecar of a direction's file: `direction.safetensors.json`."""
    path = direction_path(path)
    return path.with_name(path.name + ".json")


def save_direction(direction: Direction, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write both files into the folder `path` (or as the .safetensors file `path`), and return the tensor's path.

    The sidecar holds the SHA-256 of the tensor's file and is written first, so a direction that is there has a sidecar,
    and one that an interrupted replacement left behind is noticed when it is opened.

    Raises:
        MechintError: the direction exists and is not to be overwritten, or cannot be written.
    """
    path = direction_path(path)
    if path.exists() and not overwrite:
        raise MechintError(f"{path} exists: give another --output, or --overwrite to replace it")
    content = save({KEY: direction.vector.contiguous()}, metadata={"format": "pt"})
    write_json(sidecar_path(path), {**direction.info, "sha256": hashlib.sha256(content).hexdigest()})
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(content)
    return path


def load_direction(path: str | Path) -> Direction:
    """Open a direction: its folder, or its .safetensors file, with or without a sidecar.

    Raises:
        MechintError: no such file, not safetensors, no key `direction`, not one finite vector of norm 1, or a sidecar
            that is broken or belongs to another file.
    """
    given = Path(path)
    if given.is_file() and given.suffix != ".safetensors":
        raise MechintError(
            f"{given} is no .safetensors file: a direction is a safetensors file with the key {KEY!r}; pickles are not"
            " opened"
        )
    path = direction_path(given)
    if not path.is_file():
        raise MechintError(f"direction not found: {path}; `mechint extract-steering` makes one")
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise MechintError(f"{path} cannot be read as safetensors: {error}") from error
    if KEY not in tensors:
        raise MechintError(f"{path} has no key {KEY!r}; it has {', '.join(sorted(tensors)) or 'no tensor'}")
    vector = tensors[KEY]
    if vector.ndim != 1 or not vector.is_floating_point():
        raise MechintError(
            f"{path}: {KEY} should be one float vector, found {str(vector.dtype)[6:]} {list(vector.shape)}"
        )
    vector = vector.float()
    norm = float(vector.double().norm())
    if not abs(norm - 1) <= NORM_TOLERANCE:  # catches nan too
        raise MechintError(f"{path}: the direction has norm {norm:.6g}, expected 1: divide it by its norm")
    sidecar = sidecar_path(path)
    info = read_json(sidecar, "sidecar") if sidecar.is_file() else {}
    if "sha256" in info and info["sha256"] != sha256_file(path):
        raise MechintError(f"{sidecar} belongs to another direction than {path.name} (SHA-256): extract it again")
    if info.get("hidden_dim", len(vector)) != len(vector):
        raise MechintError(f"{sidecar} says hidden_dim {info['hidden_dim']}, but {path.name} is {len(vector)} wide")
    return Direction(vector / norm, info)


def check_direction(direction: Direction, model: LanguageModel, hook_name: str) -> None:
    """Raise `MechintError` unless the direction fits the hook: its width, and the processing it was made in."""
    if (width := model.hook_width(hook_name)) != direction.d_in:
        raise MechintError(
            f"direction {direction.name} is {direction.d_in} wide, but {hook_name} of {model.name} is"
            f" {width} wide: give the model and the hook that it was extracted from"
        )
    processing = direction.info.get("processing")
    if processing is not None and processing != model.processing:
        raise MechintError(
            f"direction {direction.name} was extracted from {processing} activations, but {model.name} is used with"
            f" processing {model.processing}: load it with processing {processing}"
        )
