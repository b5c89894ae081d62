"""Tensor files from strangers: read without running anything they carry, and without believing what they claim.

Three containers: safetensors, `.npz` without pickle, and torch's zip with `weights_only=True`. A file that claims more
than it holds (an archive that unpacks to a multiple of itself, a tensor larger than its storage, a header with a shape
that its bytes do not fill) is refused before memory is taken for it. The `peek_` functions read names and shapes alone,
for telling formats apart; they return nothing for what they cannot read.
"""

import json
import math
import pickle
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechint.errors import MechintError, one_line
from mechint.provenance import atomic_path

# The files that hold an SAE's weights, whatever its format; of several in one folder the first of these is taken.
WEIGHTS = (
    "sae_weights.safetensors",
    "sae.safetensors",
    "params.safetensors",
    "params.npz",
    "checkpoint.safetensors",
    "ae.pt",
    "sae.pt",
    "autoencoder.pt",
    "checkpoint.pt",
)
# What can lie beside them and says what they compute. Nothing else of a repository is downloaded to open an SAE.
BESIDE = (
    "cfg.json",
    "config.json",
    "metadata.json",
    "spec.json",
    "sae_weights.safetensors.json",
    "thresholds.safetensors",
    "sparsity.safetensors",
)
# What an archive may unpack to, as a multiple of its own size: float weights do not compress, archives of zeros do.
MAX_UNPACKED = 20
# Longest JSON of a safetensors header, and of saev's first line, that is looked at.
MAX_HEADER = 16 * 2**20


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`(tensors, string metadata)` of a safetensors file. Raises `MechintError` if it is missing or broken."""
    require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            # copies: the tensors are views of the mapped file, and who changes that would change the SAE
            return {name: file.get_tensor(name).clone() for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise MechintError(f"{path} is truncated or not a safetensors file: {one_line(error, 120)}") from error


def peek_safetensors(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the header of a safetensors file; empty for anything else."""
    if not path.is_file():  # a device or a pipe would be read without end
        return {}
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, path.stat().st_size - 8):
                return {}
            header = json.loads(file.read(length))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def read_pt(path: Path, *, offset: int = 0) -> dict[str, Any]:
    """The state dict in a file of `torch.save`, on the CPU whatever device it was saved on.

    `offset`: bytes before the archive. Raises `MechintError` for a file that is missing or truncated, that holds
    anything but a dict of plain values and tensors, or whose tensors claim more than is stored.
    """
    require_file(path)
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch explains strange pickles at length; the error says enough
            if zipfile.is_zipfile(file):
                refuse_bomb(path, file)
            file.seek(offset)
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MechintError(
            f"{path} is not a plain tensor file and was not executed; expected a state dict saved with torch.save"
            f" ({one_line(error, 90)})"
        ) from error
    except MechintError:
        raise
    except Exception as error:  # a broken pickle can fail in any way: IndexError, AttributeError, UnicodeError ...
        raise MechintError(
            f"{path} is truncated or not a state dict: {one_line(error, 120) or type(error).__name__}"
        ) from error
    if not isinstance(loaded, Mapping):
        raise MechintError(f"{path} holds a {type(loaded).__name__}, not the state dict of an SAE")
    for name, value in loaded.items():
        if not isinstance(name, str):
            raise MechintError(f"{path} holds a {type(name).__name__} as a name, not the state dict of an SAE")
        if isinstance(value, Tensor):
            refuse_odd_tensor(path, name, value)
    return dict(loaded)


def peek_pt(path: Path) -> frozenset[str]:
    """Names in a `.pt` state dict, its tensors left on the disk; empty for anything else."""
    if not path.is_file():
        return frozenset()
    try:
        with open(path, "rb") as file:
            start = file.read(2)
        if start != b"PK" and start[:1] != b"\x80":  # a zip; a pickle, as torch saved before 1.6
            return frozenset()  # torch.load opens files of other kinds as well
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return (
            frozenset(name for name in loaded if isinstance(name, str)) if isinstance(loaded, Mapping) else frozenset()
        )
    except Exception:  # whatever it is, it is none of ours
        return frozenset()


def read_npz(path: Path) -> dict[str, Tensor]:
    """The floating-point arrays of an `.npz`; nothing in it is ever unpickled. Raises `MechintError` as `read_pt`."""
    require_file(path)
    try:
        with open(path, "rb") as file:
            refuse_bomb(path, file)
            with zipfile.ZipFile(file) as archive:
                names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
                if (twice := _repeated(names)) is not None:
                    raise MechintError(f"{path} holds {twice} twice")
                arrays = [torch.from_numpy(_read_array(path, archive, info)) for info in archive.infolist()]
                return dict(zip(names, arrays, strict=True))
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise MechintError(f"{path} is truncated or not an .npz of arrays: {one_line(error, 120)}") from error


def peek_npz(path: Path) -> frozenset[str]:
    """Names of the arrays in an `.npz`; empty for anything else."""
    if not path.is_file():
        return frozenset()
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError):
        return frozenset()
    return frozenset(name.removesuffix(".npy") for name in names if name.endswith(".npy"))


def _read_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read_header:
            raise MechintError(f"{path}: {info.filename} has .npy version {version}, expected 1.0 or 2.0")
        shape, fortran, dtype = read_header[version](file)
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise MechintError(f"{path}: {info.filename} holds {dtype}, expected floating-point numbers")
        expected = math.prod(shape) * dtype.itemsize
        if file.tell() + expected != info.file_size:
            raise MechintError(f"{path}: {info.filename} claims shape {list(shape)}, which its bytes do not fill")
        values = np.frombuffer(file.read(), dtype=dtype).reshape(shape, order="F" if fortran else "C")
    return values.astype(dtype.newbyteorder("="))  # a copy that can be written to, in this machine's byte order


def read_settings(path: Path, what: str) -> dict[str, Any]:
    """A JSON object of settings from a stranger; `what` names it in the error. Raises `MechintError` if it is none."""
    require_file(path)
    if path.stat().st_size > MAX_HEADER:
        raise MechintError(
            f"{what} {path} has {path.stat().st_size / 2**20:.0f} MiB: no settings file does; not opened"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MechintError(f"{what} {path} cannot be read: {one_line(error, 120)}") from error
    return parse_settings(text, f"{what} {path}")


def parse_settings(text: str | bytes, source: str) -> dict[str, Any]:
    """A JSON object in which no name stands twice: readers disagree about which of them counts.

    Raises:
        MechintError: not JSON, no object, a name twice, nested too deeply, or a number that Python does not parse.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError:
        raise MechintError(f"{source} is nested too deeply") from None
    except ValueError as error:
        raise MechintError(f"{source} is not JSON that can be used: {one_line(error, 120)}") from error
    if not isinstance(value, dict):
        raise MechintError(f"{source} should hold a JSON object, found {type(value).__name__}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := _repeated([name for name, _ in pairs])) is not None:
        raise ValueError(f"{twice!r} stands there twice")
    return dict(pairs)


def _repeated(names: list[str]) -> str | None:
    """A name that is there more than once, if there is one."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def require_file(path: Path) -> None:
    if not path.is_file():
        raise MechintError(f"{path} not found" if not path.exists() else f"{path} is not a file")


def refuse_bomb(path: Path, file: IO[bytes]) -> None:
    """Raise `MechintError` for a zip that would unpack to far more than its size."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > MAX_UNPACKED * path.stat().st_size + 2**20:
        raise MechintError(
            f"{path} would unpack to {unpacked / 2**30:.1f} GiB from {path.stat().st_size / 2**20:.1f} MiB:"
            " no file of weights does; not opened"
        )


def refuse_odd_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """Raise `MechintError` unless the tensor is dense, on the CPU, and as large as what is stored for it."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device.type}"
        raise MechintError(f"{path}: {name} is {kind}, expected a dense tensor")
    claimed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > stored:
        raise MechintError(f"{path}: {name} claims {claimed} bytes of shape {list(tensor.shape)}, {stored} are stored")


def take_tensors(state: Mapping[str, Any], names: Mapping[str, str], source: str | Path) -> dict[str, Tensor]:
    """The tensors under our names: `names` maps theirs to ours, with ` T` at the end of theirs for a transpose.

    A name that ends in `?` may be absent. Raises `MechintError` for one that is missing, or not a tensor.
    """
    found = {}
    for wanted, ours in names.items():
        theirs = wanted.removesuffix("?")
        theirs, transposed = theirs.removesuffix(" T"), theirs.endswith(" T")
        if theirs not in state:
            if wanted.endswith("?"):
                continue
            raise MechintError(f"{source}: {theirs} is missing; found {', '.join(sorted(state)[:10]) or 'nothing'}")
        tensor = state[theirs]
        if not isinstance(tensor, Tensor):
            raise MechintError(f"{source}: {theirs} is a {type(tensor).__name__}, expected a tensor")
        if transposed and tensor.ndim != 2:
            raise MechintError(f"{source}: {theirs} has shape {list(tensor.shape)}, expected a matrix")
        found[ours] = tensor.t() if transposed else tensor
    return found


def refuse_unknown(state: Mapping[str, Any], known: set[str], source: str | Path) -> None:
    """Raise `MechintError` for names beyond `known`: what they do to the function is not known either."""
    unknown = sorted(set(state) - known)
    if unknown:
        raise MechintError(f"{source} holds {', '.join(unknown[:8])} too, which this format does not know")


def whole_number(value: Any, what: str, source: str | Path) -> int:
    """`value` as an int >= 1. Raises `MechintError` for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1 or value != value // 1:
        raise MechintError(f"{source}: {what} should be a whole number from 1, found {value!r}")
    return int(value)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A new safetensors file, atomically. Raises `MechintError` if there is one."""
    with atomic_path(path, overwrite=False) as temporary:
        save_file({name: _alone(tensor) for name, tensor in tensors.items()}, temporary, metadata=metadata)


def write_pt(path: Path, state: Mapping[str, Any], *, header: bytes = b"") -> None:
    """A new file of `torch.save` after `header`, atomically. Raises `MechintError` if there is one."""
    state = {name: _alone(value) if isinstance(value, Tensor) else value for name, value in state.items()}
    # through a file object: torch writes a path's name into the archive, and equal weights should be equal bytes
    with atomic_path(path, overwrite=False) as temporary, open(temporary, "wb") as file:
        file.write(header)
        torch.save(state, file)


def write_npz(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A new uncompressed `.npz`, atomically. Raises `MechintError` if there is one."""
    arrays: dict[str, Any] = {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}
    with atomic_path(path, overwrite=False) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _alone(tensor: Tensor) -> Tensor:
    """Contiguous, in a storage of its own size: torch writes the whole storage that a view belongs to."""
    tensor = tensor.contiguous()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone else tensor.clone()
