"""From texts to contexts: what the model reads at once.

A text that is longer than the context size becomes several windows, without overlap; with packing, a context holds
several texts one after another. Either way a new context begins in a store wherever a row's position is not above that
of the row before it, and nothing of a text is cut.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mechint.errors import MechintError


@dataclass(frozen=True)
class Context:
    """What the model reads at once. The three lists are of one length, an entry a token.

    `text_ids` names the text that each token is of (a BOS or separator is of the text that it begins or goes on with);
    `kept` says whether the token's row is stored.
    """

    tokens: list[int] = field(default_factory=list)
    text_ids: list[int] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)

    def add(self, tokens: Sequence[int], text_id: int, *, kept: bool) -> None:
        self.tokens.extend(tokens)
        self.text_ids.extend([text_id] * len(tokens))
        self.kept.extend([kept] * len(tokens))

    def give_last(self, after: "Context") -> None:
        """Move the last token to the beginning of the context that follows."""
        after.tokens.insert(0, self.tokens.pop())
        after.text_ids.insert(0, self.text_ids.pop())
        after.kept.insert(0, self.kept.pop())


def contexts_of(
    token_lists: Iterable[Sequence[int]],
    text_ids: Iterable[int],
    *,
    context_size: int,
    bos: int | None,
    every_window: bool = True,
    pack: bool = False,
    keep_bos: bool = False,
    separator: int | None = None,
) -> list[Context]:
    """Lay texts out as contexts of at most `context_size` tokens, in the order of the texts.

    Args:
        token_lists: the tokens of each text, without BOS.
        text_ids: the number of each text.
        context_size: most tokens of a context, BOS included; at least 2.
        bos: the token before each text; None for none.
        every_window: put `bos` before the later windows of a text, too.
        pack: fill each context with the texts that follow, each begun by `separator`. Attention is not masked: a token
            sees the texts before its own in the context. A text without tokens is left out.
        keep_bos: keep the rows of BOS and separators.
        separator: used with `pack` only: the BOS or, where none is prepended, the tokenizer's EOS.

    Raises:
        MechintError: a context size below 2, packing without a separator.
    """
    if context_size < 2:
        raise MechintError(f"--context-size {context_size}: a context must hold at least 2 tokens, a BOS and one more")
    if pack and separator is None:
        raise MechintError(
            "--pack needs a token between texts, and the tokenizer has neither BOS nor EOS: leave it out"
        )
    opener = separator if pack else bos
    contexts: list[Context] = []
    for tokens, text_id in zip(token_lists, text_ids, strict=True):
        if pack and not tokens:
            continue
        # A separator is never the last token of a context, where nothing would follow it.
        if not pack or not contexts or len(contexts[-1].tokens) + 2 > context_size:
            contexts.append(Context())
        if opener is not None:
            contexts[-1].add([opener], text_id, kept=keep_bos)
        at = 0
        while at < len(tokens):
            if len(contexts[-1].tokens) == context_size:
                contexts.append(Context())
                if every_window and bos is not None:
                    contexts[-1].add([bos], text_id, kept=keep_bos)
            taken = tokens[at : at + context_size - len(contexts[-1].tokens)]
            contexts[-1].add(taken, text_id, kept=True)
            at += len(taken)
        if not contexts[-1].tokens:  # a text without tokens and without BOS
            contexts.pop()
    _lengthen_lone_tokens(contexts, context_size)
    return contexts


def _lengthen_lone_tokens(contexts: list[Context], context_size: int) -> None:
    """Give a window of one token the last token of the window before (with the text's opener, if only that would stay).

    Its row would stand at position 0, and the next context may begin with a BOS that is not kept, so with a row at
    position 1: the two would look like one context.
    """
    for before, lone in reversed(list(itertools.pairwise(contexts))):  # giving may leave the one before alone
        if len(lone.tokens) > 1 or before.text_ids[-1] != lone.text_ids[0]:
            continue
        before.give_last(lone)
        alone = before.text_ids[-1:] == lone.text_ids[:1] and before.text_ids[-2:-1] != lone.text_ids[:1]
        if alone and len(lone.tokens) < context_size:
            before.give_last(lone)
