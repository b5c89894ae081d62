"""Writing an activation store: shards and their records one by one, `store.json` last.

    my_store/progress/asked.json     what is being collected; written first
    my_store/shard-00000.safetensors
    my_store/progress/00000.json     written after its shard is on the disk
    ...
    my_store/store.json              written last; then progress/ goes

Each file appears whole or not at all. Whatever kills the process, a shard without a record was never there, and a
folder without store.json is no store.
"""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from mechint.data.norms import add_histograms, summarise_norms
from mechint.data.tokens import add_counts
from mechint.errors import MechintError
from mechint.locks import lock, open_folder
from mechint.provenance import (
    atomic_path,
    disk_full,
    disk_full_reason,
    make_dir,
    read_json,
    remove_abandoned,
    sha256_file,
    write_json,
)

FORMAT_VERSION = 1
STORE_JSON = "store.json"
PROGRESS = "progress"
ASSEMBLED = "assembled.pt"
_SHARD = re.compile(r"shard-(\d{5,})\.safetensors")


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _record_path(folder: Path, number: int) -> Path:
    return folder / PROGRESS / f"{number:05d}.json"


def asked_path(folder: Path) -> Path:
    return folder / PROGRESS / "asked.json"


def settings_in(folder: Path) -> dict[str, Any] | None:
    """The settings of the store in `folder`, finished or not; None if there is none."""
    if (folder / STORE_JSON).exists():
        return read_json(folder / STORE_JSON, "activation store").get("settings", {})
    if asked_path(folder).exists():
        return read_json(asked_path(folder), "record of an unfinished collection").get("settings", {})
    return None


def check_place(folder: Path, settings: dict[str, Any]) -> None:
    """Raise `MechintError`, and touch nothing, unless `folder` is free or was begun with the same settings."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise MechintError(f"{folder} exists and is not a folder: give another --output")
    if asked_path(folder).exists():
        before = read_json(asked_path(folder), "record of an unfinished collection")
        check_same(before.get("settings", {}), settings, str(folder))
    elif foreign := sorted(path.name for path in folder.iterdir() if path.name != PROGRESS):
        raise MechintError(f"{folder} holds other files ({', '.join(foreign[:3])}) and no store: give another --output")


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make the folder and hold it against a second collection into it. A killed process lets go of it, too."""
    make_dir(folder)
    handle = open_folder(folder)
    try:
        if handle is not None and lock(handle) is False:
            raise MechintError(f"another process is collecting into {folder}: wait for it or stop it")
        yield
    finally:
        if handle is not None:
            os.close(handle)


def begin_store(folder: Path, asked: dict[str, Any]) -> None:
    """Record what is being collected, or pick up what was begun; remove what a kill left half done."""
    if not asked_path(folder).exists():
        write_json(asked_path(folder), asked)
    recorded = {shard_name(number) for number in finished_shards(folder)}
    for path in folder.iterdir():
        if _SHARD.fullmatch(path.name) and path.name not in recorded:
            path.unlink()
    remove_abandoned(folder)


def check_same(before: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raise `MechintError` naming the settings that differ."""
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    different = [f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in names]
    if different:
        raise MechintError(
            f"{where} was collected with other settings ({'; '.join(different)}): repeat them to go on, or give another"
            " --output, or remove it to start again"
        )


def finished_shards(folder: Path) -> dict[int, dict[str, Any]]:
    """The records of shards that are on the disk, by number, in order."""
    records = {}
    for path in sorted((folder / PROGRESS).glob("[0-9]*.json")):
        record = read_json(path, "record of a shard")
        holder = ASSEMBLED if record.get("moved") else record["name"]
        if (folder / holder).is_file():
            records[record["number"]] = record
    return dict(sorted(records.items()))


def write_shard(
    folder: Path,
    number: int,
    *,
    activations: Float[Tensor, "n d_in"],
    tokens: Int[Tensor, " n"],
    text_ids: Int[Tensor, " n"],
    positions: Int[Tensor, " n"],
    norms: Float[Tensor, " n"],
    record: dict[str, Any],
) -> None:
    """Write one shard and then its record. Raises `MechintError` when the disk is full; finished shards are kept."""
    path = folder / shard_name(number)
    tensors = {
        "activations": activations,
        "tokens": tokens,
        "text_ids": text_ids,
        "positions": positions,
        "norms": norms,
    }
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        digest = sha256_file(temporary)
    write_record(folder, {**record, "number": number, "name": path.name, "n_rows": len(activations), "sha256": digest})


def write_record(folder: Path, record: dict[str, Any]) -> None:
    write_json(_record_path(folder, record["number"]), record)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk into its `MechintError`, for writes that do not go through `atomic_path`."""
    try:
        yield
    except Exception as error:
        if (reason := disk_full_reason(error)) is not None:
            raise disk_full(path, reason) from error
        raise


def texts_sha256(texts: Sequence[str | list[int]]) -> str:
    """Hex SHA-256 over the UTF-8 bytes of each text, each preceded by their number as 8 bytes, little-endian. A text
    that the source holds as token ids counts as these in decimal, with blanks between."""
    digest = hashlib.sha256()
    for text in texts:
        data = (text if isinstance(text, str) else " ".join(map(str, text))).encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def store_info(settled: dict[str, Any], records: list[dict[str, Any]], position_0_kept: bool) -> dict[str, Any]:
    """The content of `store.json`, from what was settled at the start and the records of all shards."""
    whole = hashlib.sha256("".join(record["texts_sha256"] for record in records).encode())
    norms = add_histograms([record["norms"] for record in records])
    return {
        **settled,
        "format_version": FORMAT_VERSION,
        "n_rows": sum(record["n_rows"] for record in records),
        "n_texts": sum(record["n_texts"] for record in records),
        "texts_sha256": whole.hexdigest(),
        "texts": add_counts([record["texts"] for record in records if "texts" in record]),
        "norms": summarise_norms(norms, position_0_kept),
        "shards": [{key: record[key] for key in ("name", "n_rows", "sha256")} for record in records],
    }


def close_store(folder: Path, info: dict[str, Any]) -> None:
    """Write `store.json`, which makes the folder a store, and remove the records of progress."""
    write_json(folder / STORE_JSON, info)
    shutil.rmtree(folder / PROGRESS, ignore_errors=True)
