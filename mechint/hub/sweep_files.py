"""Run ids out of the files that describe sweeps. Files are read as text: nothing in them is ever executed.

A Python sweep file names its runs in tables, and a run that is done with is often commented out:

    in1k_run_ids = [
        "3rqci2h1",
        # "gz2dikb3",
    ]

Both are ids. Prose in a comment is not: a comment counts where nothing but ids, numbers and brackets is in it. A
docstring never counts. A table that is commented out as a whole counts as a table.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mechint.errors import MechintError, nearest, one_line

# What Weights & Biases calls a run unless it is told otherwise.
RUN_ID = r"[a-z0-9]{8}"
# Ids that stand in no table of the file.
NO_TABLE = "(no table)"
MAX_BYTES = 8 * 1024 * 1024
# Comments in comments that are looked into.
DEEPEST = 8

_TOKEN = re.compile(
    r"""(?P<long>[rRbBuUfF]{0,2}(?:\"\"\"(?:\\.|[^\\])*?\"\"\"|'''(?:\\.|[^\\])*?'''))
      | (?P<string>[rRbBuUfF]{0,2}(?:"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'))
      | (?P<comment>\#[^\n]*)
      | (?P<name>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)
      | (?P<open>[\[({])
      | (?P<close>[\])}])
      | (?P<assign>\+?=(?!=))
      | (?P<line>\n)
      | (?P<blank>[^\S\n]+)
      | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
# A comment that is code: literals, numbers and punctuation, names only before `=` or `(`; perhaps a remark behind it.
# Possessive throughout: a line of prose must not be tried in every way it can be cut up.
_COMMENTED = re.compile(
    r"""(?: [A-Za-z_][\w.]*+ (?: \s*+ (?: :[^=#"']*+ )? (?=\+?=) | (?=\() )
          | "[^"]*" | '[^']*' | \d[\w.+-]*+ | [\s\[\](){},:=+] )*+
        (?: \#.* )?""",
    re.VERBOSE,
)


def read_tables(path: str | Path, *, pattern: str = RUN_ID) -> dict[str, list[str]]:
    """The ids of each table of a sweep file, in the file's order, each id once a table.

    `path`: a Python file (tables are the names that lists, tuples, sets or dicts of ids are assigned to; a list in a
    dict is `name.key`), a JSON file (a list, or an object of lists), a `.jsonl` with a `run_id` a line, or a text file
    with an id a line.

    Raises:
        MechintError: a file that cannot be read, that holds no id, or JSON of another shape.
    """
    path = Path(path)
    text = _text(path)
    if path.suffix in (".json", ".jsonl"):
        tables = _from_json(path, text)
    elif path.suffix == ".py":
        tables = _from_source(text, re.compile(pattern))
    else:
        words = (line.strip().lstrip("#").split("#")[0].strip(" \t,'\"") for line in text.splitlines())
        tables = {NO_TABLE: [word for word in words if re.fullmatch(pattern, word)]}
    tables = {name: list(dict.fromkeys(ids)) for name, ids in tables.items() if ids}
    if not tables:
        raise MechintError(f"{path} holds no run ids (looked for {pattern!r}): give the sweep file, or another pattern")
    return tables


def read_run_ids(path: str | Path, tables: Sequence[str] = (), *, pattern: str = RUN_ID) -> list[str]:
    """The ids of the named tables of a sweep file, or of all of them; see `read_tables`. Each id once.

    Raises:
        MechintError: a table that is not there; those that are get named.
    """
    found = read_tables(path, pattern=pattern)
    for name in tables:
        if name not in found:
            sizes = ", ".join(f"{table} ({len(ids)})" for table, ids in found.items())
            raise MechintError(f"{path} has no table {name!r} of run ids; {nearest(name, found)}; it has {sizes}")
    return list(dict.fromkeys(run_id for name in tables or found for run_id in found[name]))


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise MechintError(f"{path} is larger than {MAX_BYTES} bytes: not a sweep file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
        raise MechintError(
            f"sweep file not found: {path}" + (f"; {nearest(path.name, beside)}" if beside else "")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise MechintError(f"sweep file {path} cannot be read: {one_line(error, 120)}") from error


def _from_source(text: str, pattern: re.Pattern[str]) -> dict[str, list[str]]:
    """Tables of a Python file, from its tokens alone."""
    tables: dict[str, list[str]] = {}
    _walk(text, pattern, tables, "")
    return tables


def _walk(text: str, pattern: re.Pattern[str], tables: dict[str, list[str]], outer: str, depth: int = 0) -> None:
    """Add the ids of `text`, which stands in the table `outer` if that is not empty.

    `stack` holds, for each open bracket, the table that it belongs to. Comments go through here again, without their
    marks, joined where one follows the other: a table may be commented out line by line. `depth` counts comments in
    comments.
    """
    if depth > DEEPEST:
        return
    stack: list[str] = []
    # the first name of a statement; that name once an `=` has followed it; a key whose value is a table; comments
    name, assigned, key, commented = "", "", "", ""
    tokens = [(match.lastgroup or "", match.group()) for match in _TOKEN.finditer(text)]
    for index, (kind, word) in enumerate(tokens):
        table = stack[-1] if stack else outer
        if commented and kind not in ("comment", "line", "blank"):
            _walk(commented, pattern, tables, table, depth + 1)
            commented = ""
        if kind == "comment":
            content = word.strip("# \t\r")
            if _COMMENTED.fullmatch(content):
                commented += content + "\n"
        elif kind == "line" and not stack:
            name = assigned = ""
        elif kind == "name" and not stack:
            name = name or word
        elif kind == "assign" and not stack:
            assigned = assigned or name
        elif kind == "open":
            if not stack and name.endswith((".extend", ".append")):
                assigned = name.rsplit(".", 1)[0]
            inner = table or assigned
            stack.append(f"{inner}.{key}" if key and inner else inner)
            key = ""
        elif kind == "close" and stack:
            stack.pop()
        elif kind == "string":
            literal = word.lstrip("rRbBuUfF")[1:-1]
            following = [w for k, w in tokens[index + 1 : index + 6] if k != "blank"][:2]
            if len(following) == 2 and following[0] == ":" and following[1] in ("[", "(", "{"):
                key = literal
            elif pattern.fullmatch(literal):
                tables.setdefault(table or assigned or NO_TABLE, []).append(literal)
    if commented:
        _walk(commented, pattern, tables, stack[-1] if stack else outer, depth + 1)


def _from_json(path: Path, text: str) -> dict[str, list[str]]:
    """A list of ids, an object of lists of ids, or a record with a `run_id` a line."""
    shape = "a list of run ids, an object of such lists, or (in .jsonl) an object with run_id a line"
    try:
        value: Any = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except (ValueError, RecursionError) as error:
        raise MechintError(f"{path} is not JSON: {one_line(error, 100)}") from None
    tables = value if isinstance(value, dict) else {NO_TABLE: value}
    found = {}
    for name, entries in tables.items():
        if not isinstance(entries, list):
            raise MechintError(f"{path}: {name} should be a list; expected {shape}")
        found[name] = list(_ids(path, entries, shape))
    return found


def _ids(path: Path, entries: list[Any], shape: str) -> Iterable[str]:
    for entry in entries:
        run_id = entry.get("run_id") if isinstance(entry, dict) else entry
        if not isinstance(run_id, str) or not run_id:
            raise MechintError(f"{path}: {one_line(entry, 60)!r} is no run id; expected {shape}")
        yield run_id
