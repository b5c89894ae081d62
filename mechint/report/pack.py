"""Data inside an HTML file: JSON that cannot end its own script, and typed arrays as deflated bytes in base64."""

import base64
import json
import math
import re
import struct
import zlib
from typing import Any

import numpy as np

# What the page's typed arrays are called there. Little-endian, as every browser's machine is.
TYPES = {"uint8": "u1", "int16": "i2", "uint16": "u2", "uint32": "u4", "float32": "f4"}


def json_for_script(value: Any) -> str:
    """JSON for a `<script type="application/json">`: no `<`, `>` or `&`, so no text in it can end the script or open
    a comment; NaN and infinities, which JSON lacks, become null."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # U+2028 and U+2029 end lines in old JavaScript; lone surrogates cannot be written as UTF-8
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def pack(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """Header and arrays in one string of base64: deflated [length of the header][header as JSON][arrays, 4-aligned].

    The header gains `arrays`: name -> {type, at (byte offset after the header), n}. assets/data.js reads it.
    """
    parts, places, at = [], {}, 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        data += b"\0" * (-len(data) % 4)
        places[name] = {"type": TYPES[array.dtype.name], "at": at, "n": int(array.size)}
        parts.append(data)
        at += len(data)
    text = json_for_script({**header, "arrays": places}).encode("utf-8")
    text += b" " * (-(4 + len(text)) % 4)
    packed = zlib.compress(b"".join([struct.pack("<I", len(text)), text, *parts]), 6)
    return base64.b64encode(packed).decode("ascii")


def unpack(packed: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `pack` was given (arrays flat). For tests, and for whoever wants a report's numbers back."""
    data = zlib.decompress(base64.b64decode(packed))
    (length,) = struct.unpack_from("<I", data)
    header = json.loads(data[4 : 4 + length])
    kinds = {short: name for name, short in TYPES.items()}
    arrays = {
        name: np.frombuffer(data, dtype=kinds[place["type"]], count=place["n"], offset=4 + length + place["at"])
        for name, place in header.pop("arrays").items()
    }
    return header, arrays
