"""Generation with an edit at a hook, against a plain loop that reads everything again for each token."""

import math

import pytest
import torch
from torch import Tensor

from mechint.errors import MechintError
from mechint.models import LanguageModel, generate, load_model
from mechint.models.generate import choose

PROMPT = "Anna was a clever doctor who lived in Oslo."


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_model("builtin/pythia-tiny", device="cpu")


@pytest.fixture(scope="module")
def prompt(model) -> list[int]:
    return model.tokenize([PROMPT], prepend_bos=True)[0]


def shift(amount: float, width: int = 128):
    vector = torch.linspace(-1, 1, width)

    def edit(x: Tensor) -> Tensor:
        # not linear, so that an edit done twice or at the wrong position shows
        return x + amount * vector * (1 + x.norm(dim=-1, keepdim=True) / 50)

    return edit


def plain_loop(model: LanguageModel, prompt: list[int], n: int, site: tuple[int, str] | None, edit, first: int):
    """Greedy continuation of one text with a hook of our own on the transformers model. Returns tokens and logits."""
    tokens, all_logits = list(prompt), []
    for _ in range(n):
        handle = None
        if site is not None:
            block = model.blocks[site[0]]
            if site[1] == "post":

                def after(module, args, output):
                    value = output[0] if isinstance(output, tuple) else output
                    value = value.clone()
                    value[:, first:] = edit(value[:, first:])
                    return (value, *output[1:]) if isinstance(output, tuple) else value

                handle = block.register_forward_hook(after)
            else:

                def before(module, args):
                    value = args[0].clone()
                    value[:, first:] = edit(value[:, first:])
                    return (value, *args[1:])

                handle = block.register_forward_pre_hook(before)
        with torch.no_grad():
            logits = model.hf_model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        if handle is not None:
            handle.remove()
        all_logits.append(logits)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :], torch.stack(all_logits)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("layer", "site"), [(0, "pre"), (2, "pre"), (3, "post"), (5, "post")])
@pytest.mark.parametrize("where", ["all", "last"])
def test_equals_a_plain_loop(model, prompt, use_cache: bool, layer: int, site: str, where: str):
    first = 1 if where == "all" else len(prompt) - 1
    amounts = (0.0, 2.0, -6.0)
    found = generate(
        model,
        prompt,
        max_new_tokens=12,
        hook_name=f"blocks.{layer}.hook_resid_{site}",
        edits=[None, *map(shift, amounts)],
        first_position=first,
        use_cache=use_cache,
    )
    expected = [plain_loop(model, prompt, 12, None, None, 0)[0]]
    expected += [plain_loop(model, prompt, 12, (layer, site), shift(amount), first)[0] for amount in amounts]
    assert found == expected
    assert found[0] == found[1]
    if (layer, where) != (5, "last"):
        assert len({tuple(row) for row in found}) == 3, "the edits change nothing, so this shows nothing"


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_other_families_equal_a_plain_loop(tiny_neox_dir, tmp_path, family: str):
    """Absolute positions and grouped heads, each with its own way to keep keys and values."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_neox_dir)
    torch.manual_seed(1)
    if family == "gpt2":
        hf = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=3, n_head=4))
    else:
        hf = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            )
        )  # fmt: skip
    with torch.no_grad():
        hf.get_input_embeddings().weight.mul_(30.0)
    hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    other = load_model(str(tmp_path), device="cpu")
    prompt = other.tokenize(["the cat sat on the mat"], prepend_bos=True)[0]
    edits = [None, shift(20.0, 32), shift(-30.0, 32)]
    for use_cache in (True, False):
        found = generate(
            other, prompt, max_new_tokens=10, hook_name="blocks.1.hook_resid_post", edits=edits, first_position=2,
            use_cache=use_cache,
        )  # fmt: skip
        for row, edit in zip(found, edits, strict=True):
            assert row == plain_loop(other, prompt, 10, (1, "post") if edit else None, edit, 2)[0]
        assert len({tuple(row) for row in found}) == 3


def test_cached_logits_equal_recomputed_ones(model, prompt):
    """Tokens could agree by luck; the logits behind them agree to rounding at every step."""
    from mechint.models.generate import _cached_step, _plain_step

    hook, edits, state = "blocks.3.hook_resid_post", [None, shift(5.0)], {}
    tokens = torch.tensor([prompt] * 2)
    with torch.inference_mode():
        for _ in range(12):
            cached = _cached_step(model, tokens, hook, None, edits, 4, state)
            plain = _plain_step(model, tokens, hook, None, edits, 4, {})
            torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-4)
            tokens = torch.cat((tokens, plain.argmax(-1)[:, None]), 1)
    assert state["read"] == tokens.shape[1] - 1
    _, logits = plain_loop(model, prompt, 1, (3, "post"), shift(5.0), 4)
    torch.testing.assert_close(_plain_step(model, torch.tensor([prompt]), hook, None, [shift(5.0)], 4, {}), logits)


def test_centred_processing_hands_the_edit_centred_values(prompt):
    centred = load_model("builtin/pythia-tiny", device="cpu", processing="centred")
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x

    new = generate(centred, prompt, max_new_tokens=3, hook_name="blocks.3.hook_resid_post", edits=[look])
    assert [x.shape[1] for x in seen] == [len(prompt), 1, 1]
    assert all(float(x.mean(-1).abs().max()) < 1e-4 * float(x.abs().max()) for x in seen)
    assert new == generate(centred, prompt, max_new_tokens=3)  # centring changes no prediction


@pytest.mark.slow
def test_the_bridge_gives_the_same_texts(model, prompt):
    bridge = load_model("builtin/pythia-tiny", device="cpu", backend="bridge")
    settings = dict(
        max_new_tokens=8, hook_name="blocks.3.hook_resid_post", edits=[None, shift(4.0), shift(-6.0)], first_position=1
    )
    found = generate(bridge, prompt, **settings)
    assert found == generate(model, prompt, **settings)
    assert len({tuple(row) for row in found}) == 3


def test_rows_share_their_random_numbers_and_seeds_differ(model, prompt):
    def drawn(seed: int, **settings) -> list[list[int]]:
        return generate(
            model,
            prompt,
            max_new_tokens=20,
            hook_name="blocks.3.hook_resid_post",
            edits=[None, lambda x: x, shift(3.0)],
            temperature=1.0,
            seed=seed,
            **settings,
        )

    first = drawn(1)
    assert first == drawn(1) == drawn(1, use_cache=False)
    assert first[0] == first[1] != first[2]
    assert len({tuple(drawn(seed)[0]) for seed in range(4)}) > 1
    assert drawn(1, top_k=1)[0] == generate(model, prompt, max_new_tokens=20)[0] != first[0]


def test_drawing_follows_the_probabilities():
    """Over an even grid of u, each token is drawn as often as its share of the interval says, to one grid step."""
    torch.manual_seed(0)
    logits = torch.randn(1, 7) * 2
    logits[0, 3] = -math.inf
    n = 4000

    def shares(**settings) -> Tensor:
        grid = [(i + 0.5) / n for i in range(n)]
        found = [int(choose(logits, uniform=u, **settings)) for u in grid]
        return torch.bincount(torch.tensor(found), minlength=7) / n

    for temperature in (0.5, 1.0, 3.0):
        expected = (logits[0] / temperature).softmax(-1)
        assert float((shares(temperature=temperature, top_k=None) - expected).abs().max()) <= 1.01 / n
    kept = logits[0].topk(2).indices
    expected = torch.zeros(7)
    expected[kept] = logits[0, kept].softmax(-1)
    assert float((shares(temperature=1.0, top_k=2) - expected).abs().max()) <= 1.01 / n
    assert int(choose(logits, temperature=0.0, top_k=None, uniform=0.99)) == int(logits.argmax())
    assert int(choose(logits, temperature=1.0, top_k=None, uniform=0.0)) == 0
    impossible = torch.tensor([[-math.inf, 0.0, -math.inf]])
    assert int(choose(impossible, temperature=1.0, top_k=None, uniform=0.0)) == 1
    assert int(choose(logits, temperature=1e-6, top_k=None, uniform=0.999999)) == int(logits.argmax())


def test_a_row_ends_before_end_of_text_and_others_go_on(model, prompt):
    """The edit makes end-of-text likeliest in one row: what would come after it is not shown."""
    end = model.tokenizer.eos_token_id
    row = model.hf_model.get_output_embeddings().weight[end].detach()

    def to_the_end(x: Tensor) -> Tensor:
        return x + 1e4 * row

    settings = dict(max_new_tokens=6, hook_name="blocks.5.hook_resid_post", first_position=len(prompt) + 2)
    short, whole = generate(model, prompt, edits=[to_the_end, None], **settings)
    assert len(whole) == 6 and short == whole[:3]


def test_mistakes_are_named(model, prompt):
    for settings, message in [
        (dict(prompt=[]), "the prompt has no tokens"),
        (dict(prompt=prompt, max_new_tokens=0), "--max-new-tokens must be at least 1"),
        (dict(prompt=prompt, max_new_tokens=256), "more than the 256 that builtin/pythia-tiny reads"),
        (dict(prompt=prompt, temperature=-1.0), "--temperature must be 0 or a positive number"),
        (dict(prompt=prompt, temperature=math.nan), "--temperature must be 0 or a positive number"),
        (dict(prompt=prompt, top_k=0), "--top-k must be at least 1"),
        (dict(prompt=prompt, hook_name="blocks.9.hook_resid_post"), "has 6 layers"),
    ]:
        with pytest.raises(MechintError, match=message):
            generate(model, **settings)
