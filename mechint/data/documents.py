"""A text as its source holds it, and how it is found in a record.

Whatever the file format, a record is a JSON-like object, and a field names what is read of it: a string, token ids, or
a chat. Dots reach into nested objects (`meta.body`), and through lists (`messages.content`).
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from mechint.errors import MechintError

Chat = list[dict[str, Any]]
Content = str | list[int] | Chat


class Document(NamedTuple):
    """One text: a string, its token ids, or a chat (messages with `role` and `content`)."""

    content: Content
    where: str  # for messages, such as "news.jsonl, line 17"
    n_blank: int = 0  # blank texts that were left out between the one before and this one


def without_blanks(contents: Iterable[tuple[Content, str]], max_chars: int) -> Iterator[Document]:
    """The documents that are not blank in their first `max_chars` characters (all for 0)."""
    n_blank = 0
    for content, where in contents:
        if isinstance(content, str) and _blank(content, max_chars) or not content:
            n_blank += 1
            continue
        yield Document(content, where, n_blank)
        n_blank = 0


def _blank(text: str, max_chars: int) -> bool:
    return text[: max_chars or None].isspace()


def content_of(record: Any, field: str, where: str) -> Content:
    """What `field` of a record holds; "" for null. A record that is a string is its own text.

    Lists of strings, as `messages.content` gives, are joined by line breaks. Token ids behind an `attention_mask` of
    the same record are left out where it is 0.

    Raises:
        MechintError: no such field (naming those that are there), or one that holds something else.
    """
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise MechintError(f"{where}: expected an object with a field {field!r}, found {type(record).__name__}")
    found = record.get(field, _MISSING)
    if found is _MISSING and "." in field:
        found = _inside(record, field.split("."))
    if found is _MISSING:
        raise missing_field(field, record, where)
    if found is None:
        return ""
    if isinstance(found, str):
        return found
    if isinstance(found, list):
        if not found:
            return ""
        if all(type(item) is int for item in found):
            mask = record.get("attention_mask")
            if isinstance(mask, list) and len(mask) == len(found):
                return [token for token, seen in zip(found, mask, strict=True) if seen]
            return found
        if all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in found):
            return found
        if all(item is None or isinstance(item, str) for item in found):
            return "\n".join(item or "" for item in found)
    kind = type(found).__name__
    if isinstance(found, list):
        kind = f"a list of {type(found[0]).__name__}"
    texts = [name for name in _names(record) if isinstance(_inside(record, name.split(".")), (str, list))]
    hint = f"; fields with text: {', '.join(texts)}" if (texts := [name for name in texts if name != field]) else ""
    raise MechintError(f"{where}: field {field!r} holds {kind}, not text{hint}")


def missing_field(field: str, record: Any, where: str) -> MechintError:
    """The error for a record, or a list of its fields' names, without `field`."""
    return MechintError(f"{where} has no field {field!r}, only {', '.join(_names(record))}: use --text-field")


_MISSING = object()


def _inside(value: Any, names: list[str]) -> Any:
    """What lies at the end of a path of names, through lists, or `_MISSING`."""
    if not names:
        return value
    if isinstance(value, list):
        found = [_inside(item, names) for item in value]
        return _MISSING if _MISSING in found else found
    if isinstance(value, dict) and names[0] in value:
        return _inside(value[names[0]], names[1:])
    return _MISSING


def _names(record: Any) -> list[str]:
    """The fields of a record; those of an object or of a list of objects with their dots."""
    if not isinstance(record, dict):
        return list(record)
    names = []
    for name, value in record.items():
        names.append(name)
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(inner, dict):
            names += [f"{name}.{key}" for key in inner]
    return names
