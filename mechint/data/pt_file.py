"""One `.pt` tensor from the shards of a store, without ever holding it in memory or on the disk twice."""

import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mechint.data.norms import finite_norms
from mechint.data.store import COLUMNS, shards_folder, sidecar_path, tokens_path
from mechint.data.store_write import ASSEMBLED, disk_errors, finished_shards, shard_name, write_record
from mechint.provenance import atomic_path, fsync_dir, sha256_file, write_json

_BLOCK_ROWS = 8192


def assemble_pt(output: Path, sidecar: dict[str, Any], info: dict[str, Any]) -> None:
    """Turn the finished shards beside `output` into `output`, its tokens file and its sidecar, and remove them.

    Each shard is removed once its rows are safely in the new file, so the disk never needs room for everything twice.
    Killed at any point, it goes on when called again. The .pt gets its name last: while that name is missing, nothing
    looks finished.
    """
    folder = shards_folder(output)
    records = list(finished_shards(folder).values())
    assembled = folder / ASSEMBLED
    n_rows, d_in = sum(record["n_rows"] for record in records), info["d_in"]
    if not any(record.get("moved") for record in records):
        _write_tokens(folder, records, tokens_path(output))
        with disk_errors(output):
            make_empty_pt(assembled, n_rows, d_in)
    start = data_offset(assembled)
    crc, position = 0, start
    with disk_errors(output), open(assembled, "r+b") as file:
        for record in records:
            if record.get("moved"):
                crc = record["crc32"]
            else:
                rows = load_file(folder / record["name"])["activations"]
                file.seek(position)
                for block in rows.split(_BLOCK_ROWS):
                    data = block.to(torch.float32).contiguous().numpy().tobytes()
                    file.write(data)
                    crc = zlib.crc32(data, crc)
                del rows
                file.flush()
                os.fsync(file.fileno())
                write_record(folder, {**record, "moved": True, "crc32": crc})
                (folder / record["name"]).unlink()
            position += record["n_rows"] * d_in * 4
        _set_crc(file, assembled, start, position - start, crc)
        file.flush()
        os.fsync(file.fileno())
    shard = {"name": output.name, "n_rows": n_rows, "sha256": sha256_file(assembled)}
    write_json(sidecar_path(output), {**sidecar, "store": {**info, "dtype": "float32", "shards": [shard]}})
    os.replace(assembled, output)
    fsync_dir(output.parent)
    shutil.rmtree(folder, ignore_errors=True)


def _write_tokens(folder: Path, records: list[dict[str, Any]], path: Path) -> None:
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in (*COLUMNS, "norms")}
    for record in records:
        shard = load_file(folder / shard_name(record["number"]))
        if "norms" not in shard:  # of a collection that an earlier version began
            shard["norms"] = finite_norms(shard["activations"])
        for name, parts in columns.items():
            parts.append(shard[name].clone())
    with atomic_path(path) as temporary:
        save_file({name: torch.cat(parts) for name, parts in columns.items()}, temporary)


def make_empty_pt(path: Path, n_rows: int, d_in: int) -> None:
    """What `torch.save` writes for a float32 tensor [n_rows, d_in], with a hole where its data belong."""
    hole = path.with_name(path.name + ".hole")
    try:
        with open(hole, "wb") as file:
            file.truncate(n_rows * d_in * 4)
        # mapped from a sparse file: memory of this size might not be granted, and is never touched
        tensor = torch.from_file(str(hole), shared=True, size=n_rows * d_in, dtype=torch.float32).view(n_rows, d_in)
        with torch.serialization.skip_data():
            torch.save(tensor, path)
    finally:
        hole.unlink(missing_ok=True)


def _data_record(path: Path) -> tuple[zipfile.ZipInfo, int]:
    with zipfile.ZipFile(path) as archive:
        (info,) = (info for info in archive.infolist() if info.filename.endswith("/data/0"))
        return info, archive.start_dir


def data_offset(path: Path) -> int:
    """Where the bytes of the one tensor in a file of `torch.save` begin (a zip archive, stored uncompressed)."""
    info, _ = _data_record(path)
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    # local file header: signature, ..., name length at 26, extra length at 28 (PKZIP APPNOTE 4.3.7)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name_length + extra_length


def _set_crc(file: Any, path: Path, start: int, size: int, crc: int) -> None:
    """Put the checksum of the data where the zip format keeps it: behind the data, and in the central directory.

    torch does not check it, other readers of zip archives do.
    """
    file.seek(start + size)
    if file.read(4) == b"PK\x07\x08":  # data descriptor (4.3.9)
        file.seek(start + size + 4)
        file.write(struct.pack("<I", crc))
    info, position = _data_record(path)
    while True:
        file.seek(position)
        entry = file.read(46)  # central directory header (4.3.12)
        if entry[:4] != b"PK\x01\x02":
            raise AssertionError(f"{path}: no central directory entry for {info.filename}")
        name_length, extra_length, comment_length = struct.unpack("<HHH", entry[28:34])
        if file.read(name_length).decode() == info.filename:
            file.seek(position + 16)
            file.write(struct.pack("<I", crc))
            return
        position += 46 + name_length + extra_length + comment_length
