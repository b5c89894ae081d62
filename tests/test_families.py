"""Every family of `families.py`: both backends give the same, an edit that changes nothing changes nothing, and what a
family cannot offer is refused in one line. Run on both supported majors of TransformerLens.
"""

from pathlib import Path

import pytest
import torch
from families import D_MODEL, FAMILIES, N_LAYERS, make_family

from mechint.errors import MechintError
from mechint.models import LanguageModel, load_model

SITES = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_out", "mlp.hook_out")
# The order of float32 sums differs between eager and fused attention, and where norms are folded; values are near 1.
SAME = {"atol": 3e-5, "rtol": 1e-5}
# What the pinned TransformerLens computes wrongly, or not at all. A later one may have learned it.
NOT_BRIDGED = {"cohere", "falcon_new", "opt_post_norm"}
NOT_BRIDGED_CENTRED = {*NOT_BRIDGED, "bloom", "nemotron", "xglm"}
CENTRED = [name for name, family in FAMILIES.items() if family.centres]
# Without attention or an MLP; with the residual stream added inside of the MLP, or scaled; as flat rows.
WITHOUT_PARTS = {"mamba", "bloom", "mpt", "granite", "opt", "opt_post_norm", "xglm"}


@pytest.fixture(scope="session")
def family_dir(tmp_path_factory: pytest.TempPathFactory):
    """The folder of a family's model, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = make_family(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def load(folder: Path, backend: str = "auto", processing: str = "raw", **more) -> LanguageModel:
    return load_model(str(folder), backend=backend, processing=processing, device="cpu", **more)


def tokens_of(model: LanguageModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(8, 330, (2, 11), generator=generator)


def bridged(folder: Path, processing: str, may_fail: bool) -> LanguageModel:
    model = load(folder, "bridge", processing)
    try:
        _ = model.bridge
    except MechintError as error:
        assert may_fail, error
        assert "\n" not in str(error) and "TransformerLens" in str(error)
        pytest.skip(f"not in this TransformerLens: {error}")
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_and_residual_stream_are_hugging_faces(family_dir, name: str):
    from transformers import AutoModelForCausalLM

    model = load(family_dir(name))
    assert (model.d_model, model.n_layers, len(model.blocks)) == (D_MODEL, N_LAYERS, N_LAYERS)
    assert model.n_ctx in (64, 2048) and model.d_vocab == 420
    tokens = tokens_of(model)
    hf_model = AutoModelForCausalLM.from_pretrained(family_dir(name), dtype=torch.float32)
    with torch.inference_mode():
        out = hf_model(tokens, output_hidden_states=True)
    states = out.hidden_states
    if name == "mamba":  # Hugging Face's begin behind the first block there
        states = (hf_model.get_input_embeddings()(tokens), *states)
    for layer in range(N_LAYERS):
        own = model.activations(tokens, f"blocks.{layer}.hook_resid_pre")
        torch.testing.assert_close(own, states[layer], **SAME)
        if layer + 1 < N_LAYERS:  # Hugging Face's last one is behind the final norm
            torch.testing.assert_close(
                model.activations(tokens, f"blocks.{layer}.hook_resid_post"), states[layer + 1], **SAME
            )
    assert model.hook_width("blocks.0.hook_resid_post") == D_MODEL
    torch.testing.assert_close(model.logits(tokens), out.logits, **SAME)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_does_not_reach_real_tokens(family_dir, name: str):
    model = load(family_dir(name))
    hook = f"blocks.{N_LAYERS - 1}.hook_resid_post"
    texts = ["the cat sat on the mat and the dog ran", "the dog"]
    rows = model.tokenize(texts, prepend_bos=True)
    longest = max(map(len, rows))
    for padding in (0, 1, 7):
        padded = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
        together = model.activations(padded, hook)
        for row, found in zip(rows, together, strict=True):
            alone = model.activations(torch.tensor([row]), hook)[0]
            torch.testing.assert_close(found[: len(row)], alone, **SAME)


@pytest.mark.parametrize("name", FAMILIES)
def test_identity_edits_and_others(family_dir, name: str):
    model = load(family_dir(name))
    tokens = tokens_of(model)
    clean = model.logits(tokens).log_softmax(-1)
    direction = torch.linspace(-1, 1, D_MODEL)
    for site in SITES:
        hook = f"blocks.1.{site}"
        if not model.on_transformers(hook):
            assert name in WITHOUT_PARTS, hook
            with pytest.raises(MechintError, match="nearest: .*use --backend bridge"):
                model.check_hook(hook)
            continue
        seen: list[torch.Tensor] = []

        def see(value: torch.Tensor, seen=seen) -> torch.Tensor:
            seen.append(value)
            return value

        same = model.logits_with(tokens, hook, see).log_softmax(-1)
        torch.testing.assert_close(same, clean, atol=1e-5, rtol=0)
        torch.testing.assert_close(seen[0], model.activations(tokens, hook), **SAME)
        other = model.logits_with(tokens, hook, lambda value: value + direction).log_softmax(-1)
        assert (other - clean).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "processing"), [(name, "raw") for name in FAMILIES] + [(name, "centred") for name in CENTRED]
)
def test_both_backends_agree(family_dir, name: str, processing: str):
    model = load(family_dir(name), "transformers", processing)
    refused = NOT_BRIDGED_CENTRED if processing == "centred" else NOT_BRIDGED
    bridge = bridged(family_dir(name), processing, name in refused)
    tokens = tokens_of(model)
    clean = load(family_dir(name)).logits(tokens).log_softmax(-1)
    direction = torch.linspace(-1, 1, D_MODEL)
    compared = 0
    for layer in range(N_LAYERS):
        for site in SITES:
            hook = f"blocks.{layer}.{site}"
            if not model.on_transformers(hook):
                continue
            bridge.check_hook(hook)
            expected = model.activations(tokens, hook)
            torch.testing.assert_close(bridge.activations(tokens, hook), expected, **SAME)
            if layer == 1:
                for edit in (lambda value: value, lambda value: value + direction):
                    one, other = (m.logits_with(tokens, hook, edit).log_softmax(-1) for m in (model, bridge))
                    torch.testing.assert_close(one, other, atol=1e-4 if edit(0.0 * direction).any() else 1e-5, rtol=0)
            compared += 1
    assert compared >= 2 * N_LAYERS
    torch.testing.assert_close(bridge.logits(tokens).log_softmax(-1), clean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in CENTRED])
@pytest.mark.parametrize("backend", ["transformers", "bridge"])
def test_centred_is_refused_where_the_mean_is_read(family_dir, name: str, backend: str):
    with pytest.raises(MechintError, match="--processing raw") as caught:
        load(family_dir(name), backend, "centred")
    assert "\n" not in str(caught.value) and "subtract" in str(caught.value)


@pytest.mark.parametrize("name", CENTRED)
def test_centred_changes_no_prediction(family_dir, name: str):
    model = load(family_dir(name), "transformers", "centred")
    tokens = tokens_of(model)
    clean = model.logits(tokens).log_softmax(-1)
    for hook in (f"blocks.{layer}.hook_resid_{site}" for layer in range(N_LAYERS) for site in ("pre", "post")):
        own = model.activations(tokens, hook)
        assert own.mean(-1).abs().max() < 1e-6 * own.norm(dim=-1).max()
        torch.testing.assert_close(
            model.logits_with(tokens, hook, lambda value: value).log_softmax(-1), clean, atol=1e-5, rtol=0
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_identity_at_every_hook_of_the_bridge(family_dir, name: str):
    model = bridged(family_dir(name), "raw", name in NOT_BRIDGED)
    tokens = tokens_of(model)
    clean = model.logits(tokens).log_softmax(-1)
    supported = []
    for hook in sorted(model.bridge.hook_dict):
        if ".0." in hook or ".2." in hook or "original" in hook:
            continue
        try:
            model.hook_shape(hook)
        except MechintError:
            continue
        supported.append(hook)
        same = model.logits_with(tokens, hook, lambda value: value).log_softmax(-1)
        assert (same - clean).abs().max() < 1e-5, hook
    assert "blocks.1.hook_resid_post" in supported


def test_an_encoder_that_looks_both_ways_is_refused(tmp_path: Path):
    from families import save_model, word_piece

    settings = {
        "hidden_size": D_MODEL, "intermediate_size": 40, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }  # fmt: skip
    word_piece().save_pretrained(tmp_path / "bert")
    save_model("bert", settings, tmp_path / "bert")
    with pytest.raises(MechintError, match="looks both ways") as caught:
        load(tmp_path / "bert")
    assert "\n" not in str(caught.value) and "padding" in str(caught.value)
    word_piece().save_pretrained(tmp_path / "decoder")
    save_model("bert", {**settings, "is_decoder": True}, tmp_path / "decoder")
    assert load(tmp_path / "decoder").n_layers == N_LAYERS
