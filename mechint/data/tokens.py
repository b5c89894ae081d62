"""From the documents of a source to token ids, and the count of what was done to them on the way."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from mechint.data.documents import Chat, Document
from mechint.errors import MechintError, one_line
from mechint.models.language_model import LanguageModel

# What no tokenizer can be given: halves of surrogate pairs, which JSON can spell; and NUL, which ends a string for many
# a reader of the results.
_NO_TEXT = re.compile("[\ud800-\udfff\0]")
REPLACEMENT = "\ufffd"


COUNTS = ("n_texts", "n_blank", "n_chars", "n_cut", "n_chars_cut", "n_replaced", "n_pretokenised")


class TextsRead(NamedTuple):
    """Texts as the model is given them.

    `counts` (each over these texts): `n_texts`; `n_blank`, left out before them; `n_chars` of all strings, `n_cut` of
    them cut and `n_chars_cut` characters left out; `n_replaced` characters; `n_pretokenised`, held as token ids.
    """

    texts: list[str | list[int]]  # a string each, or the token ids that the source holds
    token_lists: list[list[int]]  # without BOS
    counts: dict[str, int]


def read_texts(
    model: LanguageModel, documents: Sequence[Document], *, max_chars: int = 0, prepend_bos: bool = True
) -> TextsRead:
    """Render chats by the tokenizer's template, cut strings to `max_chars` characters (0: none), replace what is no
    character, and tokenise. Token ids are taken as they are.

    Where a BOS is to be prepended, one that a template or the source put there already is taken off.

    Raises:
        MechintError: a chat and a tokenizer without a template, a token that the model has no embedding for; with the
            file and row.
    """
    counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
    texts: list[str | list[int]] = []
    for content, where, n_blank in documents:
        counts["n_texts"] += 1
        counts["n_blank"] += n_blank
        if isinstance(content, list) and isinstance(content[0], int):
            counts["n_pretokenised"] += 1
            texts.append(cast(list[int], content))
            continue
        if isinstance(content, list):
            content = rendered(model, cast(Chat, content), where, prepend_bos=prepend_bos)
        kept = content[: max_chars or None]
        counts["n_chars"] += len(content)
        counts["n_cut"] += len(kept) < len(content)
        counts["n_chars_cut"] += len(content) - len(kept)
        if not kept.isascii() or "\0" in kept:
            kept, n_replaced = _NO_TEXT.subn(REPLACEMENT, kept)
            counts["n_replaced"] += n_replaced
        texts.append(kept)
    tokenised = iter(model.token_lists([text for text in texts if isinstance(text, str)]))
    token_lists = [next(tokenised) if isinstance(text, str) else text for text in texts]
    bos = model.bos_token_id if prepend_bos else None
    for number, (tokens, text) in enumerate(zip(token_lists, texts, strict=True)):
        _check(model, tokens, documents[number].where)
        if bos is not None and not isinstance(text, str) and tokens[:1] == [bos]:
            token_lists[number] = tokens[1:]
    return TextsRead(texts, token_lists, counts)


def rendered(model: LanguageModel, chat: Chat, where: str, *, prepend_bos: bool) -> str:
    """A chat as the text that the tokenizer's template makes of it; without its BOS if one is prepended anyway."""
    tokenizer: Any = model.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise MechintError(
            f"{where} holds a chat, and the tokenizer of {model.name} has no chat template: take a chat model, or the"
            " bare messages with --text-field FIELD.content"
        )
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise MechintError(f"{where}: the chat template of {model.name} refuses it: {one_line(error, 200)}") from error
    bos = tokenizer.bos_token
    return text.removeprefix(bos) if prepend_bos and bos else text


def _check(model: LanguageModel, tokens: list[int], where: str) -> None:
    if tokens and not (min(tokens) >= 0 and max(tokens) < model.d_vocab):
        wrong = next(token for token in tokens if not 0 <= token < model.d_vocab)
        raise MechintError(
            f"{where}: token {wrong} is none of the {model.d_vocab} that {model.name} has embeddings for: the tokenizer"
            " or the token ids belong to another model"
        )


def add_counts(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    """The sums of counts that have the same names."""
    return {name: sum(each[name] for each in counts) for name in (counts[0] if counts else ())}
