"""checkpoint.pt: the state dict that the first version of the pipeline wrote, with `b_pre` for the decoder bias.

Four tensors for a standard SAE; `threshold`, `k` or the gate's biases too for those that have them: the names alone say
which architecture it is. Nothing is ever unpickled: `.pt` files are opened with `weights_only=True`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechint.errors import MechintError
from mechint.provenance import atomic_path
from mechint.sae.base import ARCHITECTURES, SAE


def save_checkpoint(sae: SAE, path: str | Path, *, overwrite: bool = True) -> None:
    """Write the float32 tensors as a `weights_only` state dict with the old key `b_pre`, atomically."""
    tensors = sae.tensors()
    tensors["b_pre"] = tensors.pop("b_dec")
    # Through a file object: torch writes a path's name into the archive, and equal weights should be equal bytes.
    with atomic_path(path, overwrite=overwrite) as temporary, open(temporary, "wb") as file:
        torch.save(tensors, file)


def metadata_path(checkpoint: Path) -> Path:
    """`X.json` of `X.pt`: what an SAE was trained on, for a checkpoint in the legacy layout."""
    return checkpoint.with_suffix(".json")


def sae_from_state(state: dict[str, Any], source: str | Path, metadata: dict[str, Any] | None = None) -> SAE:
    """The SAE of a state dict (`b_pre` is the old name of `b_dec`). Raises `MechintError` if it is none."""
    state = dict(state)
    if "b_pre" in state and "b_dec" not in state:
        state["b_dec"] = state.pop("b_pre")
    kind = next((kind for kind in ARCHITECTURES.values() if _has_the_tensors_of(kind, state)), None)
    if kind is None or not all(isinstance(value, Tensor) for value in state.values()):
        found = ", ".join(sorted(map(str, state))[:8]) or "nothing"
        raise MechintError(
            f"{source} is not an SAE: expected W_enc, b_enc, W_dec and b_pre (or b_dec), found {found}; `mechint"
            f" identify {source}` says what it looks like"
        )
    numbers = {name for name in state if name in kind.options or name in kind.departures}
    options = {name: _number(state[name], name, source) for name in numbers}
    tensors = {name: value for name, value in state.items() if name not in numbers}
    return SAE.from_tensors(kind.architecture, tensors, source, metadata=metadata, **options)


def holds_tensors(names: frozenset[str] | set[str]) -> bool:
    """Whether these are the names in a checkpoint.pt of some architecture."""
    names = {"b_dec" if name == "b_pre" else name for name in names}
    return any(_has_the_tensors_of(kind, dict.fromkeys(names)) for kind in ARCHITECTURES.values())


def _has_the_tensors_of(kind: type[SAE], state: dict[str, Any]) -> bool:
    """Whether this is what the file of such an SAE holds; beside it may stand what it departs in."""
    return bool(kind.saved_tensors) and set(kind.saved_tensors) == set(state) - set(kind.departures)


def _number(value: Tensor, name: str, source: str | Path) -> Any:
    if value.numel() != 1:
        raise MechintError(f"{source}: {name} should be one number, found shape {list(value.shape)}")
    return value.item()
