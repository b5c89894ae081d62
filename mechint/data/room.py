"""How many vectors a collection will make, how many bytes they take, and whether the disk has room for them."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mechint.errors import MechintError

GB = 1e9
# tokens, text_ids, positions and norms: four numbers of four bytes a row
COLUMN_BYTES = 16


@dataclass(frozen=True)
class Room:
    """An estimate: `n_rows` vectors at each hook, `n_bytes` for all of them, of which `n_texts` texts are still to be
    read; and what is `free` where they go, None where the file system does not say."""

    n_rows: int
    n_bytes: int
    n_texts: int
    widths: Sequence[int]
    free: int | None
    place: Path

    def __str__(self) -> str:
        hooks = f" at each of {len(self.widths)} hooks" if len(self.widths) > 1 else ""
        return (
            f"about {self.n_rows:,} vectors{hooks} from at most {self.n_texts:,} texts: {_size(self.n_bytes)};"
            f" {'unknown room' if self.free is None else _size(self.free)} free in {self.place}"
        )


def estimate_room(
    *, rows_read: int, texts_read: int, n_texts: int, widths: Sequence[int], value_bytes: int, output: Path
) -> Room:
    """What `n_texts` texts will take if they are like the first `texts_read`, which gave `rows_read` rows.

    Args:
        widths: d_in of each hook.
        value_bytes: of one number, 4 for float32.
    """
    n_rows = math.ceil(rows_read / texts_read * n_texts)
    n_bytes = sum(n_rows * (width * value_bytes + COLUMN_BYTES) for width in widths)
    place = output.absolute().parent
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    return Room(n_rows, n_bytes, n_texts, widths, usage.free if usage.total else None, place)


def check_room(room: Room, dtype: str) -> None:
    """Raise `MechintError` if the disk cannot take it."""
    if room.free is None or room.n_bytes <= room.free:
        return
    fewer = ["fewer hooks"] if len(room.widths) > 1 else []
    smaller = ["--dtype bfloat16, which takes about half"] if dtype == "float32" else []
    texts = f"--num-texts {max(1, room.n_texts * room.free // room.n_bytes)} or less"
    raise MechintError(
        f"no room: {room}. Ask for {', '.join([texts, *smaller, *fewer])}, or give another --output (if the source"
        " ends earlier, say so with --num-texts)"
    )


def _size(n_bytes: int) -> str:
    return f"{n_bytes / GB:,.1f} GB" if n_bytes >= GB else f"{n_bytes / 1e6:,.1f} MB"
