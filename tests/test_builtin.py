"""The built-in world: the tales, their labels and splits, and the model that ships with them."""

import json
import re
import subprocess
import sys
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechint.builtin import PYTHIA_TINY, lexicon, probes, recipe, story, tales, templates, world

WORD = re.compile(r"[A-Za-z]+")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(PYTHIA_TINY)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(PYTHIA_TINY).eval()


@pytest.fixture(scope="module")
def figures():
    return json.loads((PYTHIA_TINY / "figures.json").read_text())


@pytest.fixture(scope="module")
def heldout(tokenizer):
    return recipe.encoded(tokenizer, "heldout", recipe.HELDOUT_SEED, 0, 150)


# --- the stream ---


def test_a_tale_is_a_function_of_split_seed_and_number():
    stream = list(islice(tales.iter_tales("train", seed=3), 5))
    assert stream[4] == tales.tale(4, "train", 3) == next(tales.iter_tales("train", seed=3, start=4))
    assert len({tales.tale(4, split, seed).text for split in ("train", "heldout") for seed in (0, 1)}) == 4


def test_the_stream_is_the_same_in_another_process_with_another_hash_seed():
    code = "from mechint.builtin import tales; print(tales.tale(7, 'heldout', 2)); print(tales.source_hash())"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
        for env in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"})
    ]
    assert runs[0] == runs[1] == f"{tales.tale(7, 'heldout', 2)}\n{tales.source_hash()}\n"


def test_the_generator_needs_nothing_outside_the_standard_library():
    code = (
        "import sys; from mechint.builtin import tales; tales.tale(0); "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'transformers', 'tokenizers')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_texts_have_the_promised_size_and_vocabulary():
    texts = [tale.text for tale in islice(tales.iter_tales(), 800)]
    lengths = [len(re.findall(r"\w+|[^\w\s]+", text)) for text in texts]
    assert min(lengths) >= 35 and max(lengths) <= 140 and 60 <= sum(lengths) / len(lengths) <= 100
    assert len({word.lower() for text in texts for word in WORD.findall(text)}) >= 2000


@pytest.mark.slow
def test_every_template_is_used_and_none_is_left_half_filled():
    sentences = [unit.text for index in range(6000) for unit in tales.units(index, "train", 0)]
    joined = "\n".join(sentences)
    assert not re.search(r"[{}|<>^~]|a~|  | [,.?!]", joined)
    assert all(sentence[0] in '"' or sentence[0].isupper() for sentence in sentences)
    assert not re.search(r"\b[Aa] [aeiAEI][a-z]", joined) and not re.search(r"\b[Aa]n [bcdfgjklmnpqrstvwxz]", joined)
    plain = {
        template: re.compile("".join(".+?" if kind == "slot" else _pattern(part) for kind, part in parts) + "$")
        for group in templates.GROUPS.values()
        for template in group
        for parts in [story.parse(template)[1]]
    }
    unused = [template for template, pattern in plain.items() if not any(map(pattern.match, sentences))]
    assert unused == []


def _pattern(literal: str) -> str:
    text = literal.replace("<", "").replace(">", "")
    text = "".join("[a-zA-Z]" if char == "^" else re.escape(char) for char in text.replace("^", "", 1))
    text = text.replace("a\\~", "an?").replace("A\\~", "An?")
    return f"(?i:{text})"


def test_splits_share_no_sentence():
    _assert_disjoint(400, 150)


@pytest.mark.slow
def test_splits_share_no_sentence_in_tens_of_thousands():
    assert _assert_disjoint(4000, 1200) > 30_000


def _assert_disjoint(train_tales: int, heldout_tales: int) -> int:
    train = [unit.text for index in range(train_tales) for unit in tales.units(index, "train", 0)]
    heldout = [unit.text for index in range(heldout_tales) for unit in tales.units(index, "heldout", 1)]
    assert {tales.sentence_split(text) for text in train} == {"train"}
    assert set(train).isdisjoint(heldout)
    return len(train) + len(heldout)


# --- the labels ---


def test_spans_say_what_the_words_are():
    known = {
        "weekday": set(world.WEEKDAYS), "month": set(world.MONTHS), "female_name": set(world.FEMALE_NAMES),
        "male_name": set(world.MALE_NAMES), "country": {c.name for c in world.COUNTRIES},
        "capital": {c.capital for c in world.COUNTRIES}, "language": {c.language for c in world.COUNTRIES},
        "occupation": {job.name for job in world.JOBS}, "trait": set(lexicon.PERSON_ADJECTIVES),
        "female_pronoun": {"she", "her", "hers", "herself"}, "male_pronoun": {"he", "him", "his", "himself"},
        "possessive": {"'s"}, "manner": set(lexicon.MANNER), "relative_pronoun": {"who", "that", "which", "whose",
        "when"}, "colour": set(lexicon.COLOURS),
    }  # fmt: skip
    seen = set()
    for index in range(300):
        tale = tales.tale(index, "train", 5)
        for span in tale.spans:
            assert 0 <= span.start < span.end <= len(tale.text) and span.concept in tales.CONCEPTS
            surface = tale.text[span.start : span.end]
            assert surface == surface.strip(), span
            if span.concept in known and span.concept != "occupation":
                assert {surface, surface.lower()} & known[span.concept], (surface, span)
            seen.add(span.concept)
        # The other way round: a word that means one thing only always carries its concept.
        spans = {(span.start, span.end, span.concept) for span in tale.spans}
        for match in WORD.finditer(tale.text):
            for concept in ("weekday", "country", "manner"):
                if match.group() in known[concept] and match.group() != "May":
                    covering = [s for s in spans if s[0] <= match.start() and match.end() <= s[1]]
                    # "last Monday" is labelled as a time expression, as a whole.
                    assert {concept, "time_expression"} & {s[2] for s in covering}, (match.group(), tale.text)
    parents = {concept.parent for concept in tales.CONCEPTS.values()}
    missing = set(tales.CONCEPTS) - seen - parents - {"sentence_start", "sentence_end", "text_start"}
    assert missing == set()


def test_structure_spans():
    text = 'The dog barked. "Where is it?" asked Anna. "In the park," said Anna. Who knows?'
    spans = [tales.Span(37, 41, "female_name"), tales.Span(63, 67, "female_name")]
    found = {(text[s.start : s.end], s.concept) for s in tales._structure(text, spans)}
    assert found == {
        ("The dog barked.", "sentence"),
        ('"Where is it?" asked Anna.', "sentence"),
        ('"In the park," said Anna.', "sentence"),
        ("Who knows?", "sentence"),
        ("Who knows?", "question"),
        ('"Where is it?"', "question"),
        ('"Where is it?"', "quotation"),
        ('"In the park,"', "quotation"),
        ("Anna", "repeated_name"),
    }


def test_token_labels_follow_offsets_and_parents():
    tale = tales.Tale(
        "Anna ran. Rome fell.",
        (
            tales.Span(0, 4, "female_name"), tales.Span(0, 9, "sentence"), tales.Span(5, 8, "past_tense"),
            tales.Span(10, 14, "capital"), tales.Span(10, 20, "sentence"),
        ),
    )  # fmt: skip
    offsets = [(0, 0), (0, 4), (4, 8), (8, 9), (9, 14), (14, 19), (19, 20)]  # BOS, then tokens with leading spaces
    labels = tales.token_labels(tale, offsets)
    true = {concept: [i for i, value in enumerate(row) if value] for concept, row in labels.items()}
    assert true["female_name"] == true["name"] == true["animate"] == [1]
    assert true["past_tense"] == true["verb"] == [2]
    assert true["capital"] == true["city"] == true["place"] == [4]
    assert true["sentence_start"] == [1, 4] and true["sentence_end"] == [3, 6] and true["text_start"] == [1, 2, 3]
    assert {len(row) for row in labels.values()} == {len(offsets)}


def test_pronouns_agree_with_the_people_they_stand_for():
    for index in range(400):
        tale = tales.tale(index)
        people = {span.concept for span in tale.spans if span.concept in ("female_name", "male_name")}
        words = {word.lower() for word in WORD.findall(tale.text)}
        assert "female_name" in people or not words & {"she", "her", "herself"}, tale.text
        assert "male_name" in people or not words & {"he", "him", "his", "himself"}, tale.text


def test_facts_hold_in_every_sentence_that_states_them():
    capitals = {c.name: c.capital for c in world.COUNTRIES}
    sums = {word: value for value, word in enumerate(world.NUMBERS)}
    checked = 0
    for index in range(800):
        text = tales.tale(index).text
        for country, capital in re.findall(r"[Tt]he capital of (\w+) is (\w+)\.", text):
            assert capitals[country] == capital
            checked += 1
        for left, right, total in re.findall(r"(\w+) plus (\w+) is (\w+)\.", text):
            assert sums[left.lower()] + sums[right] == sums[total]
            checked += 1
        for today, tomorrow in re.findall(r"If today is (\w+), tomorrow will be (\w+)\.", text):
            assert (world.WEEKDAYS.index(today) + 1) % 7 == world.WEEKDAYS.index(tomorrow)
            checked += 1
    assert checked > 30


@pytest.mark.parametrize(
    ("lemma", "forms"),
    [
        ("walk", "walks walked walked walking"), ("carry", "carries carried carried carrying"),
        ("drop", "drops dropped dropped dropping"), ("bake", "bakes baked baked baking"),
        ("write", "writes wrote written writing"), ("watch", "watches watched watched watching"),
        ("play", "plays played played playing"), ("go", "goes went gone going"),
    ],
)  # fmt: skip
def test_verb_forms(lemma, forms):
    assert [lexicon.verb_form(lemma, form) for form in ("s", "past", "pp", "ing")] == forms.split()


def test_noun_forms_and_articles():
    assert [lexicon.plural(n) for n in ("box", "city", "boy", "knife", "child", "cherry", "bus")] == [
        "boxes", "cities", "boys", "knives", "children", "cherries", "buses",
    ]  # fmt: skip
    assert [lexicon.article(n) for n in ("apple", "uniform", "honest man", "pear", "Irish")] == [
        "an", "a", "an", "a", "an",
    ]  # fmt: skip


# --- the tokenizer ---


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_decodes_to_itself(tokenizer, text):
    if recipe.BOS_TOKEN not in text:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text.encode("utf-8", "replace").decode()


def test_nearly_every_word_is_one_token(tokenizer):
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.unk_token_id == recipe.BOS == 0
    vocabulary = set(tokenizer.get_vocab())
    # Some words, "zero" and a few openings, stand only in sentences that the hash gave to the held-out split.
    for split, least in (("train", 0.999), ("heldout", 0.998)):
        words = [
            piece
            for tale in islice(tales.iter_tales(split, seed=9), 400)
            for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(tale.text)
        ]
        assert sum(word in vocabulary for word in words) / len(words) > least
    ids = tokenizer(" Paris is the capital", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4


def test_offsets_of_the_tokenizer_fit_the_labels(tokenizer):
    tale = tales.tale(0)
    encoding = tokenizer(tale.text, add_special_tokens=False, return_offsets_mapping=True)
    labels = tales.token_labels(tale, encoding["offset_mapping"])
    tokens = [tokenizer.decode([token]).strip() for token in encoding["input_ids"]]
    names = [token for token, holds in zip(tokens, labels["name"], strict=True) if holds]
    assert names and set(names) <= {*world.FEMALE_NAMES, *world.MALE_NAMES, *world.SURNAMES}
    ends = [token for token, holds in zip(tokens, labels["sentence_end"], strict=True) if holds]
    assert len(ends) == sum(span.concept == "sentence" for span in tale.spans)


# --- the model that ships ---


def test_shipped_folder_is_whole_and_small(figures):
    names = {path.name for path in PYTHIA_TINY.iterdir()}
    expected = "config.json model.safetensors tokenizer.json tokenizer_config.json generation_config.json README.md"
    assert names >= {*expected.split(), "training_curve.csv", "training_curve.png", "figures.json"}
    assert sum(path.stat().st_size for path in PYTHIA_TINY.parent.rglob("*") if path.suffix != ".pyc") < 8_000_000
    config = json.loads((PYTHIA_TINY / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["dtype"]) == (6, 128, "float32")
    assert str(figures["heldout_ce"]) in (PYTHIA_TINY / "README.md").read_text()


def test_shipped_model_was_trained_on_this_generator(figures):
    # Whoever changes the tales must train the model again: its record names the text it learned from.
    assert figures["tales_sha256"] == recipe.stream_hash()


def test_shipped_model_beats_counts_by_what_its_card_says(model, figures, heldout):
    import torch
    from safetensors import safe_open

    with safe_open(PYTHIA_TINY / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118
    assert next(model.parameters()).dtype == torch.float32
    measured = recipe.cross_entropy(model, heldout)
    assert measured == pytest.approx(figures["heldout_ce"], abs=0.08)
    assert figures["heldout_ce"] < figures["bigram_ce"] - 1.0 < figures["unigram_ce"] - 2.0


@pytest.mark.slow
def test_recorded_cross_entropies_are_reproduced(model, tokenizer, figures):
    rows = recipe.encoded(tokenizer, "heldout", figures["heldout_seed"], 0, figures["heldout_tales"])
    assert recipe.cross_entropy(model, rows) == pytest.approx(figures["heldout_ce"], abs=2e-3)
    train = recipe.encoded(tokenizer, "train", figures["seed"], 0, recipe.BASELINE_TALES)
    unigram, bigram = recipe.baselines(train, rows, len(tokenizer))
    assert unigram == pytest.approx(figures["unigram_ce"], abs=1e-3)
    assert bigram == pytest.approx(figures["bigram_ce"], abs=1e-3)


def test_baselines_on_a_stream_with_a_known_answer():
    # After BOS comes 1 or 2, and each is always followed by itself once more.
    rows = [[0, 1, 1], [0, 2, 2]] * 500
    unigram, bigram = recipe.baselines(rows, rows, 3)
    assert unigram == pytest.approx(0.6931, abs=0.01)
    # BOS to 1 or 2 costs ln 2; 1 to 1 and 2 to 2 cost nearly nothing.
    assert bigram == pytest.approx(0.6931 / 2, abs=0.01)


def test_model_knows_what_its_card_says_it_knows(model, tokenizer, figures):
    measured = probes.shares(model, tokenizer)
    assert measured == pytest.approx(figures["right_answers"], abs=0.03)
    # The weak kinds (sums, opposites, names of pets, towns that open a text) are on the card as they are.
    strong = {
        "capital of a country", "language of a country", "country of a river", "where a job is done",
        "the next weekday", "country of a town, in mid-sentence", "the city a person was said to live in",
    }  # fmt: skip
    assert {kind for kind in strong if measured[kind] < 0.9} == set()
    card = (PYTHIA_TINY / "README.md").read_text()
    assert all(f"| {kind} | {share:.0%} |" in card for kind, share in figures["right_answers"].items())


@pytest.mark.parametrize(
    ("prompt", "right", "wrong"),
    [("The queens near the horses", "are", "is"), ("The queen near the horses", "is", "are")],
)
def test_verb_agrees_with_its_subject_across_another_noun(model, tokenizer, prompt, right, wrong):
    import torch

    ids = [0, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    logits = model(torch.tensor([ids])).logits[0, -1]
    right_id, wrong_id = (tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in (right, wrong))
    assert logits[right_id] > logits[wrong_id] + 1.0


@pytest.mark.slow
def test_sixteen_directions_do_not_carry_the_residual_stream(model, tokenizer, heldout):
    """The gate that makes SAE quality mean something: PCA-16 recovers less than 90 % of what mean ablation loses."""
    import torch

    layer = model.gpt_neox.layers[3]  # its output is blocks.3.hook_resid_post
    kept: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, out: kept.append(out))
    rows = []
    with torch.inference_mode():
        for batch in range(0, 600, 50):
            ids, mask = recipe.padded(recipe.encoded(tokenizer, "train", 5, batch, 50))
            mask[:, 0] = False
            model(ids)
            rows.append(kept.pop()[mask])
    handle.remove()
    acts = torch.cat(rows)
    mean = acts.mean(0)
    directions = torch.linalg.svd(acts - mean, full_matrices=False).Vh

    def spliced(replace) -> float:
        def hook(module, args, out):
            new = replace(out).clone()
            new[:, 0] = out[:, 0]  # BOS is context, and stays
            return new

        handle = layer.register_forward_hook(hook)
        try:
            return recipe.cross_entropy(model, heldout)
        finally:
            handle.remove()

    clean = recipe.cross_entropy(model, heldout)
    ablated = spliced(lambda out: mean.expand_as(out))
    share = {}
    for k in (16, 128):
        basis = directions[:k]
        share[k] = (ablated - spliced(lambda out, basis=basis: (out - mean) @ basis.T @ basis + mean)) / (
            ablated - clean
        )
    assert ablated > clean + 3
    assert share[16] < 0.90
    assert share[128] == pytest.approx(1, abs=1e-3)


# --- the recipe ---


@pytest.mark.slow
def test_recipe_end_to_end(tmp_path, capsys, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(recipe, "TOKENIZER_TALES", 300)
    monkeypatch.setattr(recipe, "BASELINE_TALES", 200)
    output = tmp_path / "tiny"
    argv = ["--output", str(output), "--steps", "12", "--heldout-tales", "20", "--batch-size", "8"]
    assert recipe.main(argv) == 0
    assert "held-out cross-entropy" in capsys.readouterr().out
    figures = json.loads((output / "figures.json").read_text())
    lines = (output / "training_curve.csv").read_text().splitlines()
    assert lines[0] == "step,tokens,seconds,train_loss,heldout_ce" and lines[-1].startswith("12,")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    rows = recipe.encoded(tokenizer, "heldout", recipe.HELDOUT_SEED, 0, 20)
    assert recipe.cross_entropy(model, rows) == pytest.approx(figures["heldout_ce"], abs=1e-3)
    before = (output / "model.safetensors").read_bytes()
    assert recipe.main(argv) == 2
    assert "exists" in capsys.readouterr().err and (output / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("flag", "value"), [("--steps", "0"), ("--minutes", "-1"), ("--lr", "0")])
def test_recipe_refuses_bad_numbers_before_any_work(tmp_path, capsys, flag, value):
    assert recipe.main(["--output", str(tmp_path / "x"), flag, value]) == 2
    assert flag in capsys.readouterr().err and not (tmp_path / "x").exists()
