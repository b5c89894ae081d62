"""What is said of texts: before a collection, how much it will be; after it, what was left out and how to keep it."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechint.errors import MechintError

# Token, text, position and norm of each row.
COLUMN_BYTES = 16
LARGE_SHARD = 2 * 10**9  # bytes


def forecast(
    n_texts: int, *, exact: bool, rows_per_text: float, widths: Sequence[int], itemsize: int, output: Path
) -> str:
    """How many vectors and bytes `n_texts` more texts will be, beside the free disk.

    Args:
        exact: whether `n_texts` is known, not judged by the part that was read.
        widths: d_in of each hook.
        itemsize: bytes of one number of a vector.

    Raises:
        MechintError: they cannot fit.
    """
    n_rows = round(n_texts * rows_per_text)
    bytes_per_row = _bytes_per_row(widths, itemsize)
    needed, (free, place) = n_rows * bytes_per_row, free_bytes(output)
    hooks = f" at each of {len(widths)} hooks" if len(widths) > 1 else ""
    size = f"{'' if exact else 'about '}{plural(n_texts, 'text')}, about {n_rows:,} vectors{hooks}, {in_bytes(needed)}"
    if free is None:  # some network disks do not say
        return f"this will be {size}"
    if needed > free:
        fitting = int(free / max(rows_per_text * bytes_per_row, 1))
        smaller = ["--dtype bfloat16"] if itemsize == 4 and output.suffix != ".pt" else []
        fewer = ["fewer hooks"] if hooks else []
        raise MechintError(
            f"no room: {size} do not fit into {place}, where {in_bytes(free)} are free: --num-texts {fitting} fits; or"
            f" take {', '.join([*smaller, *fewer, 'another --output'])}"
        )
    return f"this will be {size}; {in_bytes(free)} are free there"


def shard_note(n_texts: int, *, rows_per_text: float, widths: Sequence[int], itemsize: int) -> list[str]:
    """What to do about shards that take more memory than most machines have to spare; nothing about others.

    All rows of a shard, at every hook, are in memory at once, about twice over while it is written.
    """
    size = n_texts * rows_per_text * _bytes_per_row(widths, itemsize)
    if size <= LARGE_SHARD:
        return []
    fewer = max(int(n_texts * LARGE_SHARD / size), 1)
    return [
        f"a shard of {plural(n_texts, 'text')} will take about {in_bytes(round(size))} of memory: --checkpoint-every"
        f" {fewer} keeps it to {in_bytes(LARGE_SHARD)}"
    ]


def _bytes_per_row(widths: Sequence[int], itemsize: int) -> int:
    return sum(width * itemsize + COLUMN_BYTES for width in widths)


def free_bytes(output: Path) -> tuple[int | None, Path]:
    """Free disk where `output` is or will be, None where the file system does not say; and the folder there."""
    place = output.absolute()
    while not place.is_dir():
        place = place.parent
    usage = shutil.disk_usage(place)
    return (usage.free if usage.total else None), place


def in_bytes(n: int) -> str:
    """A number of bytes in the largest unit that it has one of."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n / 1000:.3g} kB"


def plural(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def treatment(counts: dict[str, int], info: dict[str, Any], of: str) -> list[str]:
    """What happens to texts with these counts (`TextsRead.counts`, `lay_out`), a line each.

    Stores that earlier versions wrote have no counts; nothing is said of them.

    Args:
        info: the fields of the store.
        of: what the counts are over, such as "4,000 texts".
    """
    if not counts:
        return []
    lines = []
    if counts["n_cut"]:
        share = 100 * counts["n_chars_cut"] / counts["n_chars"]
        lines.append(
            f"{counts['n_cut']:,} of {of} cut to {info['max_chars']} characters, which leaves out {share:.3g} % of all"
            " characters: --max-chars 0 keeps them"
        )
    if info["pack"]:
        lines.append(
            f"{of} packed into {plural(counts['n_contexts'], 'context')} of at most {info['context_size']} tokens; a"
            " token attends to the texts before its own there"
        )
    elif counts["n_split"]:
        bos = "each after BOS, " if info["bos_every_window"] else "the first after BOS, "
        lines.append(
            f"{counts['n_split']:,} of {of} longer than {info['context_size']} tokens: split into windows,"
            f" {bos if info['prepend_bos'] else ''}nothing left out"
        )
    if counts["n_blank"]:
        lines.append(f"{plural(counts['n_blank'], 'blank text')} skipped")
    if counts["n_replaced"]:
        lines.append(
            f"{plural(counts['n_replaced'], 'character')} that no text can hold (NUL, half a surrogate pair) replaced"
            " by U+FFFD"
        )
    if counts["n_pretokenised"]:
        lines.append(f"{counts['n_pretokenised']:,} of {of} taken as the token ids that the source holds")
    return lines
