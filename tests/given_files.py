"""Texts written in any of the formats that are read."""

import csv
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet


def write_texts(folder: Path, texts: list[str], kind: str, name: str = "part") -> Path:
    path = folder / f"{name}{kind}"
    kind, _, packing = kind[1:].partition(".")
    records = [{"id": i, "text": text} for i, text in enumerate(texts)]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)
        return path
    if kind == "txt":
        data = "\n".join(texts) + "\n"
    elif kind == "jsonl":
        data = "\n".join(json.dumps(record) for record in records)
    elif kind == "json":
        data = json.dumps(records, indent=1)
    else:
        stream = io.StringIO()
        rows = csv.DictWriter(stream, ["id", "text"], delimiter="," if kind == "csv" else "\t")
        rows.writeheader()
        rows.writerows(records)
        data = stream.getvalue()
    name = {"gz": "gzip", "zst": "zstd", "": None}[packing]
    raw = data.encode()
    path.write_bytes(raw if name is None else pyarrow.compress(raw, name, asbytes=True))
    return path
