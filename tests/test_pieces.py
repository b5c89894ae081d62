"""The pieces that tokens write, on each kind of tokenizer: nothing is lost of the text between them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mechint.analysis import highlight_html, highlight_text, token_ids, token_strings, token_texts
from mechint.errors import MechintError
from mechint.models.pieces import decoder

WORDS = "the initial place with a lot of cats, and the dog ran far away from home again. It's 2,000 miles!"
TEXTS = [WORDS, "北京 and née", "👩‍🚀 flew", "a  b\n\tc", "x"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 5, trainer)
    return tokenizer


def sentencepiece_like(*, prefix: bool) -> Tokenizer:
    """As Llama's (with a space before the first word) and Gemma's (without): bytes where a character is unknown."""
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator([WORDS.replace("\n", "")] * 5, trainer)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """As T5's: unigrams, no bytes."""
    words = [(f"▁{word}", -2.0) for word in sorted(set(WORDS.split()))]
    letters = [(letter, -9.0) for letter in sorted({"▁", *WORDS.replace(" ", "")})]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *words, *letters], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 5, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "llama_like": lambda: sentencepiece_like(prefix=True),
    "gemma_like": lambda: sentencepiece_like(prefix=False),
    "metaspace": metaspace,
    "word_piece": word_piece,
}
WITH_BYTES = ("byte_level", "llama_like", "gemma_like")


@pytest.fixture(scope="module")
def fast() -> dict[str, Any]:
    from transformers import PreTrainedTokenizerFast

    return {name: PreTrainedTokenizerFast(tokenizer_object=make()) for name, make in KINDS.items()}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_are_the_text(fast: dict[str, Any], kind: str):
    decode = decoder(fast[kind])
    for text in TEXTS if kind in WITH_BYTES else TEXTS[:1]:
        ids = ids_of(fast[kind], text)
        pieces = token_strings(decode, ids)
        assert len(pieces) == len(ids)
        # a space that the tokenizer puts before the first word is shown
        assert "".join(pieces).removeprefix(" ") == decode(ids).removeprefix(" ")
        if kind in WITH_BYTES:
            assert "".join(pieces).removeprefix(" ") == text
    assert token_strings(decode, []) == []


@pytest.mark.parametrize("kind", KINDS)
def test_words_keep_the_space_before_them(fast: dict[str, Any], kind: str):
    tokenizer = fast[kind]
    ids = ids_of(tokenizer, "the cats ran with a lot of dog")
    whole = "".join(token_strings(decoder(tokenizer), ids[2:9]))
    assert whole and whole in tokenizer.decode(ids)
    texts = token_texts(decoder(tokenizer), range(len(tokenizer)))
    assert any(text.startswith(" ") and len(text) > 2 for text in texts), "tokens by themselves keep it too"
    exact = token_ids(tokenizer, "the", exact=True)
    assert exact and all(texts[i].strip() == "the" for i in exact)
    if kind != "word_piece":  # there, a space is said by what does not follow on
        assert token_ids(tokenizer, " the")
    with pytest.raises(MechintError, match="no token of this tokenizer contains 'zebra'"):
        token_ids(tokenizer, "zebra")


def test_a_word_piece_that_goes_on_has_no_space(fast: dict[str, Any]):
    tokenizer = fast["word_piece"]
    inner = next(token for token in tokenizer.get_vocab() if token.startswith("##") and len(token) > 2)
    assert token_texts(decoder(tokenizer), [tokenizer.get_vocab()[inner]]) == [inner.removeprefix("##")]


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_a_character_of_several_tokens_is_the_last_ones(fast: dict[str, Any], kind: str):
    decode, ids = decoder(fast[kind]), ids_of(fast[kind], "a 京b")
    pieces = token_strings(decode, ids)
    at = pieces.index("京")
    assert pieces[at - 2 : at] == ["", ""] and "".join(pieces).strip() == "a 京b"
    # cut in the middle of the character: what is there makes none, and nothing else is lost
    assert "".join(token_strings(decode, ids[:at])).rstrip("\ufffd").strip() == "a"
    assert "".join(token_strings(decode, ids[at:])).lstrip("\ufffd") == "b"


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd▁\0"), max_size=12))
def test_any_text_comes_back(text: str):
    for kind in WITH_BYTES:
        tokenizer = TOKENIZERS.setdefault(kind, KINDS[kind]())
        ids = tokenizer.encode(text).ids
        found = "".join(token_strings(lambda ids, t=tokenizer: t.decode(ids, skip_special_tokens=False), ids))
        assert found.removeprefix(" ") == text.removeprefix(" ")


TOKENIZERS: dict[str, Tokenizer] = {}


def test_a_decoder_of_single_tokens():
    assert token_strings(lambda ids: f"<{ids[0]}>", [3, 4, 3]) == ["<3>", "<4>", "<3>"]


def test_a_token_without_text_is_shown_where_it_fires():
    assert highlight_text(["a", "", "北"], 1) == "a>>>\u00b7<<<北" and highlight_text(["a", "", "b"], 0) == ">>>a<<<b"
    assert ">\u00b7</span>" in highlight_html(["a", ""], [0.0, 1.0]) and "\u00b7" not in highlight_html(
        ["a", ""], [1.0, 0.0]
    )


REAL = Path(os.environ.get("MECHINT_REAL", Path(__file__).resolve().parent.parent / "build"))


@pytest.mark.parametrize("name", ["SmolLM2", "gemma-3-270m"])
def test_real_tokenizers(name: str):
    files = sorted(REAL.rglob(f"*{name}*.gguf")) if REAL.is_dir() else []
    if not files:
        pytest.skip(f"no {name} below {REAL}: `make real` fetches it, or MECHINT_REAL names the folder")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name)
    for text in TEXTS:
        ids = ids_of(tokenizer, text)
        pieces = token_strings(decoder(tokenizer), ids)
        assert len(pieces) == len(ids) and "".join(pieces) == text
    middle = token_strings(decoder(tokenizer), ids_of(tokenizer, WORDS)[1:6])
    assert middle[0] == " initial"
