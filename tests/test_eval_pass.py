"""The one pass over texts: its shortcuts against whole models, and every number against float64 computations here."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HOOK

from mechint.errors import MechintError
from mechint.eval import Text, evaluate_texts, language_metrics, one_pass, predictions
from mechint.eval.predictions import Unembedding, WholeLogits, compare, fix
from mechint.inside import Inside, special_tokens
from mechint.models import LanguageModel, load_model
from mechint.models.splice import Splice, make_splice
from mechint.sae import SAE, StandardSAE

# --- predictions -----------------------------------------------------------------------------------------------------


def exact(clean: torch.Tensor, edited: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of `edited` and KL(clean || edited) of logits, from log-softmaxes in float64."""
    log_p, log_q = clean.double().log_softmax(-1), edited.double().log_softmax(-1)
    return -log_q.gather(1, targets[:, None])[:, 0], (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("offset", [0.0, -200.0, 300.0])
@pytest.mark.parametrize(("tile", "rows"), [(7, 5), (64, 1000), (1000, 1)])
def test_compared_predictions_are_those_of_log_softmaxes(
    tile: int, rows: int, offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the tiles, and for logits whose exponentials overflow or vanish."""
    monkeypatch.setattr(predictions, "TILE", tile)
    monkeypatch.setattr(predictions, "ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(61, 8, generator=generator), 3 * torch.randn(61, generator=generator) + offset
    clean = 2 * torch.randn(23, 8, generator=generator)
    edited = clean + torch.randn(23, 8, generator=generator)
    by_position = torch.randn(2, 4, 8, generator=generator)
    positions = torch.tensor([0] * 9 + [1] * 9 + [3] * 5)
    targets = torch.randint(0, 61, (23,), generator=generator)

    head = Unembedding(weight, bias)
    found = compare(clean, [edited, clean], head, targets, fixed=fix(list(by_position), head), positions=positions)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.double() @ weight.double().T + bias.double()

    others = [edited, clean, by_position[0][positions], by_position[1][positions]]
    for index, other in enumerate(others):
        nll, kl = exact(logits(clean), logits(other), targets)
        assert found.nll[index].tolist() == pytest.approx(nll.tolist(), rel=1e-4, abs=1e-4)
        assert found.kl[index].tolist() == pytest.approx(kl.tolist(), rel=1e-4, abs=1e-4)
    assert found.nll_clean.tolist() == pytest.approx(found.nll[1].tolist()) and not found.kl[1].any()
    # The same from logits that exist already, which are left as they were.
    given = [logits(hidden).float() for hidden in (clean, edited)]
    before = [part.clone() for part in given]
    again = compare(given[0], [given[1]], WholeLogits(61), targets)
    assert again.kl[0].tolist() == pytest.approx(found.kl[0].tolist(), rel=1e-3, abs=1e-4)
    assert all(torch.equal(*pair) for pair in zip(given, before, strict=True))


def test_nothing_to_compare() -> None:
    found = compare(torch.zeros(0, 4), [torch.zeros(0, 4)], WholeLogits(4), torch.zeros(0, dtype=torch.int64))
    assert found.nll.shape == found.kl.shape == (1, 0) and found.nll_clean.shape == (0,)


# --- running from the hook on ----------------------------------------------------------------------------------------


def small(kind: str, **changes: Any) -> Any:
    """A random model of another architecture, whose LayerNorms and biases are not at their defaults."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import AutoConfig

    sizes: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        sizes |= {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64}
    else:
        sizes |= {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
        sizes |= {"max_position_embeddings": 64}
    if kind == "gemma2":
        sizes |= {"num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 0.5}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def wrapped(hf_model: Any, processing: str = "raw") -> LanguageModel:
    return LanguageModel(
        name="small", location="", hf_model=hf_model, tokenizer=None, processing=processing, backend="transformers",
        device="cpu",
    )  # fmt: skip


@pytest.mark.parametrize("processing", ["raw", "centred"])
@pytest.mark.parametrize(
    "hook_name", ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_pre", "blocks.1.hook_resid_post"]
)
@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "llama"])
def test_the_rest_of_the_model_is_the_model(kind: str, hook_name: str, processing: str) -> None:
    if kind == "llama" and processing == "centred":
        pytest.skip("RMSNorm reads the mean too; tests/test_families.py has the refusal")
    model = wrapped(small(kind), processing)
    tokens = torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    splice = make_splice(model, hook_name, tokens[0].tolist())
    assert isinstance(splice, Splice), splice
    value, final = splice.clean(tokens)
    assert torch.allclose(value, model.activations(tokens, hook_name), atol=1e-5)
    assert torch.allclose(final @ splice.weight.T, model.logits(tokens), atol=1e-4)
    changed = splice.rerun(2 * value + 1)
    expected = model.logits_with(tokens, hook_name, lambda hooked: 2 * hooked + 1)
    assert torch.allclose(changed @ splice.weight.T, expected, atol=1e-4)
    assert not torch.allclose(changed, final, atol=1e-2)
    # The model is left as it was found.
    assert torch.equal(model.logits(tokens), model.hf_model(input_ids=tokens).logits)
    assert not any("forward" in vars(block) for block in model.blocks)


def test_blocks_before_the_hook_are_not_run_again() -> None:
    model = wrapped(small("gpt_neox"))
    splice = make_splice(model, "blocks.2.hook_resid_post", [1, 2, 3])
    assert isinstance(splice, Splice)
    value, _ = splice.clean(torch.tensor([[1, 2, 3, 4]]))
    ran: list[int] = []
    for index, block in enumerate(model.blocks):
        block.get_submodule("mlp").register_forward_hook(lambda *_, index=index: ran.append(index))
    splice.rerun(value)
    assert ran == [3]


def test_models_whose_logits_are_more_than_an_unembedding_are_left_alone() -> None:
    reason = make_splice(wrapped(small("gemma2")), "blocks.1.hook_resid_post", [1, 2, 3])
    assert isinstance(reason, str) and "not the unembedding" in reason
    assert isinstance(make_splice(object(), "blocks.1.hook_resid_post", [1, 2]), str)


# --- the whole pass --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_neox_dir: Path) -> LanguageModel:
    return load_model(str(tiny_neox_dir), device="cpu", hook_name=HOOK)


@pytest.fixture(scope="module")
def sae(model: LanguageModel) -> SAE:
    """Reconstructs well enough to matter, and has latents that never fire."""
    rows = model.activations(torch.arange(100)[None], HOOK)[0]
    made = StandardSAE(32, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        made.b_dec.copy_(rows.mean(dim=0))
        made.W_enc.copy_(made.W_dec.T)
        made.b_enc[60:] = -1e6
    return made


def subject_of(model: LanguageModel, sae: SAE, hook_name: str = HOOK) -> Inside:
    return Inside(sae, model, hook_name, Path("x"), None, True, False, None)


def random_texts(lengths: list[int], first: int = 1) -> list[Text]:
    """BOS (0) first, unseen if `first` is 1, and another special token in the middle of some."""
    generator = torch.Generator().manual_seed(6)
    texts = []
    for number, length in enumerate(lengths):
        tokens = torch.randint(1, 200, (length,), generator=generator).tolist()
        tokens[0] = 0
        if number % 3 == 0 and length > 4:
            tokens[length // 2] = 0
        texts.append(Text(tokens, [position >= first for position in range(length)]))
    return texts


def expected(
    model: LanguageModel, sae: SAE, texts: list[Text], mean: torch.Tensor, *, special: bool, seen: bool
) -> dict:
    """Every metric from its definition, over rows of special tokens or not, and rows unseen by the SAE or not."""
    edits: dict[str, Callable] = {
        "clean": lambda x: x,
        "sae": lambda x: sae.run(x)[0],
        "zero": torch.zeros_like,
        "mean": lambda x: mean.expand_as(x),
    }
    rows, nll, kl = [], {name: [] for name in edits}, {name: [] for name in edits}
    for text in texts:
        tokens = torch.tensor([text.tokens])
        kept = torch.tensor([special or token != 0 for token in text.tokens])
        rows.append(model.activations(tokens, HOOK)[0][kept & (torch.tensor(text.seen) | (not seen))])
        where = torch.tensor(text.seen)[:, None]

        def edited(x: torch.Tensor, edit: Callable, where: torch.Tensor = where) -> torch.Tensor:
            return torch.where(where, edit(x), x)

        logits = {
            name: model.logits_with(tokens, HOOK, partial(edited, edit=edit))[0, :-1] for name, edit in edits.items()
        }
        for name in edits:
            parts = exact(logits["clean"], logits[name], tokens[0, 1:])
            for found, part in zip((nll, kl), parts, strict=True):
                found[name].append(part[kept[:-1]])
    x = torch.cat(rows).double()
    with torch.no_grad():
        x_hat, acts = (part.double() for part in sae.run(x.float()))
    squared = (x - x_hat).square().sum(dim=1)
    ce = {name: float(torch.cat(parts).mean()) for name, parts in nll.items()}
    divergence = {name: float(torch.cat(parts).mean()) for name, parts in kl.items()}
    fvu = float(squared.sum() / (x - x.mean(dim=0)).square().sum())
    return {
        "l0": float((acts > 0).sum(dim=1).double().mean()),
        "l1": float(acts.sum(dim=1).mean()),
        "mse_per_token": float(squared.mean()),
        "mse_per_dim": float(squared.mean()) / 32,
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "explained_variance_legacy": float((1 - squared / (x - mean.double()).square().sum(dim=1)).mean()),
        "cosine": float(torch.nn.functional.cosine_similarity(x, x_hat).mean()),
        "l2_ratio": float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()),
        "relative_reconstruction_bias": float(x_hat.square().sum() / (x * x_hat).sum()),
        "n_val": len(x),
        **{f"ce_{name}": value for name, value in ce.items()},
        **{f"kl_clean_{name}": value for name, value in divergence.items() if name != "clean"},
        **{f"kl_score_{name}": 1 - divergence["sae"] / divergence[name] for name in ("zero", "mean")},
        "n_predicted": sum(map(len, nll["clean"])),
    }


LENGTHS = [9, 2, 17, 5, 5, 12, 3]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_every_metric_with_and_without_special_tokens(model: LanguageModel, sae: SAE, batch_size: int) -> None:
    texts = random_texts(LENGTHS)
    mean = torch.linspace(-1, 1, 32)
    found = evaluate_texts(subject_of(model, sae), texts, mean=mean, batch_size=batch_size, n_resamples=50)
    for part, special, seen in ((found, True, True), (found["with_special"], True, False)):
        for name, value in expected(model, sae, texts, mean, special=special, seen=seen).items():
            assert part[name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    for name, value in expected(model, sae, texts, mean, special=False, seen=False).items():
        assert found["without_special"][name] == pytest.approx(value, rel=2e-4, abs=1e-5), name
    # BOS and the zeros in the middle are special: they are what makes the three differ.
    n_special = sum(text.tokens.count(0) for text in texts)
    assert found["with_special"]["n_val"] - found["without_special"]["n_val"] == n_special > len(texts)
    assert found["with_special"]["n_val"] - found["n_val"] == len(texts)
    for baseline in ("zero", "mean"):
        lost = found[f"ce_{baseline}"] - found["ce_clean"]
        recovered = (found[f"ce_{baseline}"] - found["ce_sae"]) / lost if lost > 0 else None
        assert found[f"ce_recovered_{baseline}"] == (None if recovered is None else pytest.approx(recovered))
    # Every metric has its interval, and every interval its metric.
    for name in ("ci95", "ci95_with_special", "ci95_without_special"):
        values = found if name == "ci95" else found[name.removeprefix("ci95_")]
        assert {key for key, value in values.items() if isinstance(value, float)} - {"val_mse", "val_l0"} - {
            "dead_fraction", "dense_fraction",
        } <= found[name].keys() | {"ce_recovered_zero", "ce_recovered_mean"}  # fmt: skip
        assert all(low <= values[key] <= high for key, (low, high) in found[name].items() if key != "fvu")


def test_counts_of_latents_are_over_rows_that_the_sae_was_trained_on(model: LanguageModel, sae: SAE) -> None:
    texts = random_texts(LENGTHS)
    found = evaluate_texts(subject_of(model, sae), texts, n_resamples=0)
    rows = torch.cat([model.activations(torch.tensor([text.tokens]), HOOK)[0, 1:] for text in texts])
    active = sae.encode(rows) > 0
    assert found["dead_features"] == int((~active.any(dim=0)).sum()) >= 4
    assert found["dense_features"] == int((active.float().mean(dim=0) > 0.1).sum())
    assert sum(found["l0_histogram"]["counts"]) == found["n_val"] == len(rows)
    # Without a mean there is nothing to put in and nothing for the legacy variant to be about.
    assert "ce_mean" not in found and found["explained_variance_legacy"] is None and found["ci95"] == {}


@pytest.mark.parametrize("first", [0, 1])
def test_the_shortcuts_change_nothing(
    model: LanguageModel, sae: SAE, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, mean = random_texts(LENGTHS, first), torch.linspace(-1, 1, 32)
    taken: list[bool] = []
    plain = one_pass.fixed_baselines

    def watched(*args: Any) -> Any:
        found = plain(*args)
        taken.append(found is not None)
        return found

    def metrics() -> dict[str, float]:
        found = language_metrics(sae, model, texts, mean, HOOK)
        return {name: value for name, value in found.items() if value is not None}

    monkeypatch.setattr(one_pass, "fixed_baselines", watched)
    fast = metrics()
    assert taken == [True]
    monkeypatch.setattr(one_pass, "fixed_baselines", lambda *_: None)
    from_hook = metrics()
    monkeypatch.setattr(one_pass, "make_splice", lambda *_: "not taken")
    whole = metrics()
    assert fast == pytest.approx(whole, rel=1e-4, abs=1e-6) and from_hook == pytest.approx(whole, rel=1e-4, abs=1e-6)
    assert len(whole) >= 9


def test_fixed_predictions_only_where_they_are_the_same_in_all_texts(model: LanguageModel) -> None:
    splice = make_splice(model, HOOK, [0, 1, 2])
    assert isinstance(splice, Splice)
    forward = one_pass.FromHook(splice)
    same = random_texts(LENGTHS)
    assert one_pass.fixed_baselines(forward, same, [torch.zeros_like]) is not None
    # The token that keeps its own value differs between texts.
    other = [*same, Text([7, 1, 2], [False, True, True])]
    assert one_pass.fixed_baselines(forward, other, [torch.zeros_like]) is None
    # A hole in what the SAE may touch.
    holes = [*same, Text([0, 1, 2], [False, True, False])]
    assert one_pass.fixed_baselines(forward, holes, [torch.zeros_like]) is None
    # An edit that does not put the same value everywhere: the proof on other tokens finds it.
    assert one_pass.fixed_baselines(forward, same, [torch.zeros_like, lambda value: 2 * value]) is None
    found = language_metrics(StandardSAE(32, 64), model, holes, torch.zeros(32), HOOK)
    assert found["n_predicted"] == sum(LENGTHS) - len(LENGTHS) + 2


def test_hooks_inside_a_layer_go_through_the_whole_model(tiny_neox_dir: Path) -> None:
    hook_name = "blocks.2.hook_mlp_out"
    model = load_model(str(tiny_neox_dir), device="cpu", hook_name=hook_name)
    assert isinstance(make_splice(model, hook_name, [0, 1]), str)
    sae = StandardSAE(32, 64, generator=torch.Generator().manual_seed(1))
    texts = random_texts([6, 4, 6])
    found = evaluate_texts(subject_of(model, sae, hook_name), texts, mean=torch.zeros(32), n_resamples=0)
    x = torch.cat([model.activations(torch.tensor([text.tokens]), hook_name)[0, 1:] for text in texts])
    with torch.no_grad():
        squared = (x - sae.run(x)[0]).square().sum(dim=1)
    assert found["mse_per_token"] == pytest.approx(float(squared.mean()), rel=1e-4)
    # Zero and mean 0 are the same edit.
    assert found["ce_zero"] == pytest.approx(found["ce_mean"], rel=1e-6) and found["ce_zero"] != found["ce_clean"]


def test_texts_as_strings(model: LanguageModel, sae: SAE) -> None:
    subject = subject_of(model, sae)
    lines = ["the cat sat on the mat", "and the dog ran far away from home"]
    texts = [Text(row, [False] + [True] * (len(row) - 1)) for row in model.tokenize(lines, prepend_bos=True)]
    found, same = (evaluate_texts(subject, given, mean=torch.zeros(32)) for given in (lines, texts))
    assert found == same and found["n_texts_ce"] == 2
    for nothing in ([], [Text([0], [False])]):
        with pytest.raises(MechintError, match="no"):
            evaluate_texts(subject, nothing)
    with pytest.raises(MechintError, match="two tokens"):
        evaluate_texts(subject, [Text([0], [False])])


def test_special_tokens_include_token_0(model: LanguageModel) -> None:
    assert special_tokens(model.tokenizer) == {0}
