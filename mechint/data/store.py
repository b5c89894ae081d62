"""Reading activations: a store folder, a `.pt` with its sidecar, or an old bare `.pt`. See `docs/store.md`."""

import functools
import json
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mechint.config import layer_of_hook
from mechint.data.norms import finite_norms
from mechint.data.store_write import FORMAT_VERSION, STORE_JSON, asked_path
from mechint.errors import MechintError, one_line
from mechint.provenance import read_json, sha256_file, sha256_json

COLUMNS = ("tokens", "text_ids", "positions")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@final
class Activations:
    """`n_rows` vectors of width `d_in`, on disk and mapped into memory, so that only what is read is loaded.

    Attributes:
        path: what was opened.
        info: the fields of `store.json` (of the sidecar for a .pt); empty for a bare .pt.
        d_in, n_rows: the shape.
    """

    def __init__(self, path: Path, info: dict[str, Any], parts: list[Tensor], column_files: list[Path]):
        self.path, self.info = path, info
        self._parts, self._column_files = parts, column_files
        self.d_in: int = parts[0].shape[1]
        sizes = torch.tensor([len(part) for part in parts])
        self._ends = sizes.cumsum(0)
        self.n_rows: int = int(self._ends[-1])

    def __repr__(self) -> str:
        where = self.info.get("hook_name", "unknown hook")
        return f"Activations({self.n_rows:,} x {self.d_in} of {where}, {self.path})"

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors as they are stored."""
        return sum(part.numel() * part.element_size() for part in self._parts)

    @property
    def tokens(self) -> Int[Tensor, " n_rows"] | None:
        """Token id of each row; None for a bare .pt."""
        return self._columns.get("tokens")

    @property
    def text_ids(self) -> Int[Tensor, " n_rows"] | None:
        """Number of each row's text in its source; None for a bare .pt."""
        return self._columns.get("text_ids")

    @property
    def positions(self) -> Int[Tensor, " n_rows"] | None:
        """Position of each row in what the model read, a prepended BOS being 0; None for a bare .pt."""
        return self._columns.get("positions")

    @functools.cached_property
    def context_ids(self) -> Int[Tensor, " n_rows"] | None:
        """Number of each row's context (what the model read at once), counted from 0; None for a bare .pt.

        A new one begins where the position is not above that of the row before, and, unless texts were packed, at each
        new text.
        """
        text_ids, positions = self.text_ids, self.positions
        if text_ids is None or positions is None:
            return None
        begins = positions[1:] <= positions[:-1]
        if not self.info.get("pack"):
            begins |= text_ids[1:] != text_ids[:-1]
        return torch.cat([torch.zeros(min(len(positions), 1), dtype=torch.long), begins.cumsum(0)])

    @functools.cached_property
    def _columns(self) -> dict[str, Tensor]:
        if not self._column_files:
            return {}
        columns = {}
        for name in COLUMNS:
            columns[name] = torch.cat([_read_tensor(file, name).clone() for file in self._column_files])
            if len(columns[name]) != self.n_rows:
                raise MechintError(
                    f"{self.path} has {self.n_rows} rows, but {len(columns[name])} {name}: its files do not belong"
                    " together; collect again"
                )
        return columns

    @functools.cached_property
    def norms(self) -> Float[Tensor, " n_rows"]:
        """Euclidean norm of each row, in float32. Computed, which reads everything once, where they are not stored."""
        files = self._column_files or [None] * len(self._parts)
        found = []
        for part, file in zip(self._parts, files, strict=True):
            if file is not None and "norms" in _names_in(file):
                found.append(_read_tensor(file, "norms").clone())
            else:
                found.append(finite_norms(part))
            if len(found[-1]) != len(part):
                raise MechintError(f"{file} holds {len(found[-1])} norms of {len(part)} rows: collect again")
        return torch.cat(found)

    def rows(self, indices: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        """The rows with these numbers, in this order, as float32 in memory of their own.

        Ascending indices are read fastest. Raises `IndexError` for numbers below 0 or from `n_rows` on.
        """
        if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= self.n_rows):
            raise IndexError(f"row numbers must lie in 0 <= i < {self.n_rows}")
        if len(self._parts) == 1:
            return self._parts[0].index_select(0, indices).to(torch.float32)
        found = torch.empty(len(indices), self.d_in)
        part_of = torch.bucketize(indices, self._ends, right=True)
        if not bool((part_of[1:] >= part_of[:-1]).all()):
            order = part_of.argsort()
            found[order] = self.rows(indices[order])
            return found
        numbers, counts = part_of.unique_consecutive(return_counts=True)
        start = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            part = self._parts[number]
            local = indices[start : start + count] - (self._ends[number] - len(part))
            found[start : start + count] = part.index_select(0, local)
            start += count
        return found

    def batches(
        self, batch_size: int, indices: Int[Tensor, " n"] | None = None
    ) -> Iterator[Float[Tensor, "batch d_in"]]:
        """All rows (or those of `indices`) in order, once, as float32; the last batch may be short."""
        if indices is not None:
            for start in range(0, len(indices), batch_size):
                yield self.rows(indices[start : start + batch_size])
            return
        for start in range(0, self.n_rows, batch_size):
            yield self._slice(start, min(start + batch_size, self.n_rows))

    def _slice(self, start: int, end: int) -> Float[Tensor, "n d_in"]:
        """Rows `start` to `end`; without copying them one by one, as `rows` must."""
        pieces = []
        for part, part_end in zip(self._parts, self._ends.tolist(), strict=True):
            first = part_end - len(part)
            if first < end and start < part_end:
                pieces.append(part[max(start - first, 0) : end - first].to(torch.float32, copy=True))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def tensor(self) -> Float[Tensor, "n_rows d_in"]:
        """All rows as one float32 tensor: mapped from the file for a .pt, else assembled in memory (4 * n_rows * d_in
        bytes)."""
        if len(self._parts) == 1 and self._parts[0].dtype == torch.float32:
            return self._parts[0]
        whole = torch.empty(self.n_rows, self.d_in)
        for part, end in zip(self._parts, self._ends.tolist(), strict=True):
            whole[end - len(part) : end] = part
        return whole

    def check_finite(self) -> None:
        """Read everything once. Raises `MechintError` naming the first row that holds NaN or Inf."""
        for part, end in zip(self._parts, self._ends.tolist(), strict=True):
            for start in range(0, len(part), 16384):
                block = part[start : start + 16384]
                # One pass, and no mask of the block's size: a sum is finite only if all terms are (or it overflows).
                if bool(block.sum(dtype=torch.float64).isfinite()):
                    continue
                bad = (~block.isfinite()).any(dim=1).nonzero()
                if len(bad):
                    row = end - len(part) + start + int(bad[0])
                    raise MechintError(
                        f"{self.path}: row {row} holds NaN or Inf; collect again (with --dtype float32 if it was"
                        " another), or leave that row out"
                    )

    @functools.cached_property
    def sha256(self) -> str:
        """Identity of the content: for a store, of its list of shards with their hashes; for a .pt, of the file."""
        shards = self.info.get("shards")
        if self.path.is_dir():
            return sha256_json(shards)
        return shards[0]["sha256"] if shards else sha256_file(self.path)

    def verify(self) -> None:
        """Hash every file. Raises `MechintError` naming the first that is not what was recorded at collection."""
        for shard in self.info.get("shards", []):
            file = self.path / shard["name"] if self.path.is_dir() else self.path
            if sha256_file(file) != shard["sha256"]:
                raise MechintError(f"{file} was changed since it was collected: its SHA-256 differs from the record")


def open_activations(path: str | Path) -> Activations:
    """Open a store folder, a `.pt` written by collect, or a bare float32 `.pt` of the first version.

    Raises:
        MechintError: missing, unfinished, truncated, of another kind, width or version; a pickle that carries code
            (which is never run).
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_store(path)
    if path.is_file():
        return _open_pt(path)
    if asked_path(unfinished := shards_folder(path)).exists():
        raise _unfinished(path, unfinished)
    raise MechintError(
        f"activations not found: {path}; make them with python scripts/collect_activations.py --output {path}"
    )


def shards_folder(output: Path) -> Path:
    """Where the shards of an output are collected: beside a .pt, else the output itself."""
    return output.with_name(output.name + ".shards") if output.suffix == ".pt" else output


def sidecar_path(output: Path) -> Path:
    """`X.json` of `X.pt`, or the `store.json` of a folder."""
    return output.with_suffix(".json") if output.suffix == ".pt" else output / STORE_JSON


def tokens_path(output: Path) -> Path:
    return output.with_suffix(".tokens.safetensors")


def _unfinished(path: Path, folder: Path) -> MechintError:
    asked = read_json(asked_path(folder), "record of an unfinished collection")
    return MechintError(f"the collection of {path} is not finished; go on with: {asked.get('command')}")


def _open_store(path: Path) -> Activations:
    if not (path / STORE_JSON).is_file():
        if asked_path(path).exists():
            raise _unfinished(path, path)
        inside = sorted(store.parent for store in path.glob(f"*/{STORE_JSON}"))
        if inside:
            raise MechintError(f"{path} holds one store for each hook: give one of {', '.join(map(str, inside))}")
        raise MechintError(f"{path} is not an activation store: it has no {STORE_JSON}")
    info = read_json(path / STORE_JSON, "activation store")
    _check_version(info, path)
    try:
        d_in, dtype, shards = info["d_in"], DTYPES[info["dtype"]], info["shards"]
        names = [(path / shard["name"], shard["n_rows"]) for shard in shards]
    except (KeyError, TypeError) as error:
        raise MechintError(f"{path / STORE_JSON} lacks or misstates {error}; docs/store.md lists its fields") from None
    if not names:
        raise MechintError(f"{path} is an empty store: it lists no shard")
    parts = []
    for file, n_rows in names:
        part = _read_tensor(file, "activations")
        if part.shape != (n_rows, d_in) or part.dtype != dtype:
            raise MechintError(
                f"{file} holds {_shape(part)}, but {STORE_JSON} says {dtype} [{n_rows}, {d_in}]: collect again"
            )
        parts.append(part)
    return Activations(path, info, parts, [file for file, _ in names])


def _check_version(info: dict[str, Any], path: Path) -> None:
    version = info.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise MechintError(f"{path}: format_version should be a whole number from 1 on, found {version!r}")
    if version > FORMAT_VERSION:
        raise MechintError(
            f"{path} has format version {version}, this mechint reads up to {FORMAT_VERSION}: update mechint"
        )


def _shape(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _read_tensor(file: Path, name: str) -> Tensor:
    """A tensor of a safetensors file, mapped."""
    try:
        _check_length(file)
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)
    except FileNotFoundError:
        raise MechintError(f"{file} is missing, the rest of its store is useless without it: collect again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise MechintError(f"{file} is damaged or no safetensors file with {name!r}: {one_line(error)}") from error


def _names_in(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as tensors:
        return set(tensors.keys())


def _check_length(file: Path) -> None:
    """Raise ValueError unless the file is as long as its header says; mapping a shorter one could end in SIGBUS."""
    with open(file, "rb") as opened:
        start = opened.read(8)
        if len(start) < 8:
            raise ValueError(f"only {len(start)} bytes long")
        (length,) = struct.unpack("<Q", start)
        size = file.stat().st_size
        if length > size:
            raise ValueError("the header is cut off")
        header = json.loads(opened.read(length))
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    end = 8 + length + max(ends, default=0)
    if end != size:
        raise ValueError(f"{size} bytes long, its header says {end}")


def _open_pt(path: Path) -> Activations:
    tensor = _load_pt(path)
    if not isinstance(tensor, Tensor):
        raise MechintError(f"{path} holds a {type(tensor).__name__}, not one tensor of activations [N, d_in]")
    if tensor.ndim != 2 or not tensor.is_floating_point() or not tensor.numel():
        raise MechintError(f"{path} holds {_shape(tensor)}, expected floating-point activations [N, d_in]")
    info = _sidecar_info(path)
    if "n_rows" in info and (info["n_rows"], info["d_in"]) != tuple(tensor.shape):
        raise MechintError(
            f"{path} holds {_shape(tensor)}, but {sidecar_path(path)} says [{info['n_rows']}, {info['d_in']}]: they do"
            " not belong together"
        )
    return Activations(path, info, [tensor], [tokens_path(path)] if not info.get("legacy") and info else [])


def _load_pt(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch explains strange pickles at length; the error says enough
            try:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):  # files of torch < 1.6 are no zip archives
                    raise
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises nearly anything on broken bytes
        message = one_line(error, 160)
        if "weights_only" in str(error) or "WeightsUnpickler" in str(error):
            reason = "it holds more than tensors, and code in it is not run"
        else:
            reason = f"truncated or not written by torch.save ({message})"
        raise MechintError(f"{path} is not an activation file: {reason}") from error


def _sidecar_info(path: Path) -> dict[str, Any]:
    """What the sidecar says; the original's sidecars get the settings that the original always had, and say so."""
    if not sidecar_path(path).is_file():
        return {}
    sidecar = read_json(sidecar_path(path), "sidecar")
    if "store" in sidecar:
        _check_version(sidecar["store"], sidecar_path(path))
        return sidecar["store"]
    config = sidecar.get("config")
    if not isinstance(config, dict) or not sidecar.keys() >= {"activation_dim", "activation_path", "num_vectors"}:
        return {}  # another file that happens to have this name
    hook_name = config.get("hook_name")
    return {
        "legacy": True,
        "assumed": "centred residual, BOS prepended and kept: the original pipeline always collected so, and does not"
        " say it in its sidecars",
        "hook_name": hook_name,
        # the original's `layer` could contradict its hook, and its activation_dim was always 512
        "layer": layer_of_hook(hook_name) if isinstance(hook_name, str) else None,
        "model_name": config.get("model_name"),
        "model_source": config.get("model_source"),
        "dataset_name": config.get("dataset_name"),
        "dataset_split": config.get("dataset_split"),
        "n_texts": config.get("num_texts"),
        "max_chars": config.get("max_chars"),
        "seed": config.get("seed"),
        "processing": "centred",
        "prepend_bos": True,
        "keep_bos": True,
        "dtype": "float32",
        "git_commit": sidecar.get("git_commit"),
    }
