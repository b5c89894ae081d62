"""Models larger than one device: spread over all that there are by accelerate, and their linear layers in 8 bits."""

import importlib.util
import logging
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mechint.errors import MechintError

logger = logging.getLogger(__name__)
# The precision beside 8-bit linear layers: of norms, embeddings and activations.
BESIDE_INT8 = torch.bfloat16


def placing(device: str, device_map: str | Mapping[str, Any] | None, *, int8: bool) -> dict[str, Any]:
    """What `from_pretrained` has to be told so that the parts of a model lie where they should; empty for a model that
    is moved to `device` as a whole.

    Args:
        device_map: "auto", or where each module lies: a device, a number of a GPU, "cpu" or "disk".

    Raises:
        MechintError: the package that this takes is not installed.
    """
    if device_map is None and not int8:
        return {}
    _need("accelerate", "--device-map" if device_map is not None else "--dtype int8")
    # What fits no memory is written to a temporary folder, which lasts as long as the process.
    found: dict[str, Any] = {"device_map": device_map or {"": device}, "offload_folder": _offload_folder()}
    if int8:
        _need("bitsandbytes", "--dtype int8")
        from transformers import BitsAndBytesConfig

        found["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return found


def _need(package: str, flag: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MechintError(
            f"{flag} needs the package {package}: pip install {package} (or 'mechint[large]'), or leave {flag} out"
        )


_folders: list[tempfile.TemporaryDirectory] = []  # removed when the interpreter ends


def _offload_folder() -> str:
    _folders.append(tempfile.TemporaryDirectory(prefix="mechint-offload-"))
    return _folders[-1].name


def places(hf_model: nn.Module) -> dict[str, str]:
    """Where the modules of a model lie that has a device map; empty for one that lies on one device as a whole."""
    found = getattr(hf_model, "hf_device_map", None) or {}
    return {name: f"cuda:{place}" if isinstance(place, int) else str(place) for name, place in found.items()}


def main_device(hf_model: nn.Module, device: str) -> str:
    """The device that the tokens of a model go to, and its values come back to: the first in its map that computes."""
    computing = [place for place in places(hf_model).values() if place not in ("cpu", "disk")]
    return computing[0] if computing else "cpu" if places(hf_model) else device


def warn_if_offloaded(hf_model: nn.Module, name: str) -> None:
    """Say so where weights have to be brought to a device again for every batch."""
    found = places(hf_model)
    main = main_device(hf_model, "cpu")
    away = [module for module, place in found.items() if place == "disk" or (place == "cpu" and main != "cpu")]
    if away:
        shown = ", ".join(away[:3]) + (" ..." if len(away) > 3 else "")
        logger.warning(
            "%s: %d of %d parts (%s) do not lie on a device that computes and are brought there for every batch, which"
            " is slow: a smaller --dtype, or more or larger devices, avoid it",
            name,
            len(away),
            len(found),
            shown,
        )


def on_one_device(hf_model: nn.Module) -> bool:
    return len(set(places(hf_model).values())) <= 1 and "disk" not in places(hf_model).values()


def weight(hf_model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A parameter or buffer of the model's state dict on the CPU, also where only its place on disk is in memory."""
    if not tensor.is_meta:
        return tensor.detach().cpu()
    from accelerate.utils import align_module_device

    path, _, last = name.rpartition(".")
    module = hf_model.get_submodule(path)
    with align_module_device(module, torch.device("cpu")):
        return getattr(module, last).detach().clone()
