"""Texts that are given to a command (`--eval-texts-path`), as the model of an SAE reads them."""

from collections.abc import Sequence

from mechint.data.contexts import Context, contexts_of
from mechint.data.documents import Document
from mechint.data.forecast import plural, treatment
from mechint.data.tokens import read_texts
from mechint.errors import MechintError
from mechint.eval.texts import Text
from mechint.inside import Inside


def given_texts(inside: Inside, documents: Sequence[Document]) -> tuple[list[Text], list[str]]:
    """`given_contexts` where there is something to predict, as texts. Raises `MechintError` if there is nowhere."""
    contexts, notes = given_contexts(inside, documents)
    long = [context for context in contexts if len(context.tokens) > 1]
    if not long:
        raise MechintError("no evaluation text has two tokens, so there is nothing to predict: give longer texts")
    if n_short := len(documents) - len({context.text_ids[0] for context in long}):
        notes.append(f"{plural(n_short, 'text')} of one token left out, which predict nothing")
    return [Text(context.tokens, context.kept) for context in long], notes


def given_contexts(inside: Inside, documents: Sequence[Document]) -> tuple[list[Context], list[str]]:
    """The documents laid out as the SAE's activations were; and in words, what was done to them.

    A document's number is its place among them. One that is longer than the context size becomes several windows, each
    after BOS if one is prepended.

    Raises:
        MechintError: a text that cannot be tokenised.
    """
    model = inside.model
    read = read_texts(model, documents, prepend_bos=inside.prepend_bos)
    size = min(inside.context_size or model.n_ctx, model.n_ctx)
    contexts = contexts_of(
        read.token_lists,
        range(len(documents)),
        context_size=size,
        bos=model.bos_token_id if inside.prepend_bos else None,
        keep_bos=inside.first_seen() == 0,
    )
    n_split = sum(len(tokens) > size - inside.prepend_bos for tokens in read.token_lists)
    settings = {"pack": False, "bos_every_window": True, "prepend_bos": inside.prepend_bos, "context_size": size}
    return contexts, treatment({**read.counts, "n_split": n_split}, settings, plural(len(documents), "text"))
