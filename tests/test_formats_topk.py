"""Top-k with and without ReLU after it: both open here, and one with ReLU goes into formats that have none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_formats import codes, linear_state, make, read, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechint.cli import convert as convert_command
from mechint.cli import export as export_command
from mechint.cli import identify as identify_command
from mechint.errors import MechintError
from mechint.eval.sums import ReconstructionSums
from mechint.formats import FORMATS, plain_form, reference_encode
from mechint.formats.certificate import certify
from mechint.formats.convert import convert, held_variant, load, write_proved
from mechint.formats.folds import pad_topk, silent_latents
from mechint.sae import SAE, Objective, build_sae, load_sae, save_checkpoint
from mechint.sae.architectures.topk import TopKSAE

WITHOUT = ("mech_platform", "saev")


def signed(d_in: int = 5, d_sae: int = 7, k: int = 5) -> TopKSAE:
    """Without ReLU, biases below 0 so that negative entries are chosen."""
    sae = TopKSAE(d_in, d_sae, k=k, relu=False, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc.normal_(-1.0, generator=torch.Generator().manual_seed(1))
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(2))
    sae.metadata = {"hook_name": "blocks.0.hook_resid_post", "model_name": "gpt2", "processing": "raw"}
    return sae


def top_of(pre: Tensor, k: int) -> Tensor:
    top = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, top.indices, top.values)


# --- our module -------------------------------------------------------------------------------------------------------


def test_a_topk_without_relu_keeps_negative_entries_and_reconstructs_with_them():
    sae, x = signed(), torch.randn(30, 5, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        x_hat, f = sae.run(x)
        assert torch.equal(f, top_of(sae.pre_activations(x), 5)) and (f < 0).any()
        torch.testing.assert_close(x_hat, f @ sae.W_dec + sae.b_dec)
        sae.relu = True
        assert torch.equal(sae.encode(x), f.relu())


def test_its_l0_counts_negative_entries_too():
    sae, x = signed(), torch.randn(30, 5, generator=torch.Generator().manual_seed(3))
    sums = ReconstructionSums(5, 7)
    with torch.no_grad():
        x_hat, f = sae.run(x)
    sums.add(x, x_hat, f)
    assert sums.metrics()["l0"] == 5.0 and int(sums.fire_counts.sum()) == 150


def test_its_checkpoint_says_so_and_that_of_others_has_not_changed(tmp_path: Path):
    sae, x = signed(), torch.randn(30, 5)
    save_checkpoint(sae, tmp_path / "a.pt")
    (tmp_path / "a.json").write_text(json.dumps({"sae_metadata": sae.metadata}))
    back = load_sae(tmp_path / "a.pt")
    assert isinstance(back, TopKSAE) and back.relu is False and back.metadata == sae.metadata
    assert torch.equal(back.encode(x), sae.encode(x)) and "relu=False" in repr(back)
    save_checkpoint(build_sae("topk", 5, 7, options={"k": 3}), tmp_path / "usual.pt")
    assert set(torch.load(tmp_path / "usual.pt")) == {"W_enc", "b_enc", "W_dec", "b_pre", "k"}


def test_saelens_layout_refuses_it(tmp_path: Path):
    """Who opens such a folder would apply ReLU."""
    with pytest.raises(MechintError, match="keeps negative entries"):
        signed().save_model(tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_it_is_applied_and_not_trained():
    with pytest.raises(MechintError, match="not trained"):
        signed().loss(torch.randn(4, 5), Objective())
    with pytest.raises(MechintError, match="does not apply"):
        build_sae("topk", 5, 7, options={"relu": False})


@pytest.mark.parametrize("k", [torch.tensor(float("nan")), torch.tensor(float("inf")), torch.tensor([3, 4])])
def test_a_checkpoint_with_an_odd_k_is_an_error(k: Tensor, tmp_path: Path):
    save_checkpoint(build_sae("topk", 5, 7, options={"k": 3}), tmp_path / "a.pt")
    torch.save({**torch.load(tmp_path / "a.pt"), "k": k}, tmp_path / "a.pt")
    with pytest.raises(MechintError, match="k "):
        load_sae(tmp_path / "a.pt")


# --- files without ReLU, here -----------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A run of the mech platform, with what its files say."""
    state = linear_state() | {"decoder.bias": torch.randn(5)}
    state["encoder.bias"] -= 1
    folder = tmp_path / "run-000051"
    folder.mkdir()
    save_file(state, folder / "sae_weights.safetensors")
    sidecar = {"dtype": "torch.float32", "input_dim": 5, "k": 4, "n_features": 7, "training": None}
    (folder / "sae_weights.safetensors.json").write_text(json.dumps(sidecar))
    spec = {"parameters": {"model": "gpt2", "hook_site": "blocks.8.hook_resid_pre"}}
    (folder / "spec.json").write_text(json.dumps(spec))
    return folder, state


def test_a_mech_platform_bundle_opens_in_the_api_and_in_commands(
    bundle: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder, state = bundle
    x = torch.randn(40, 5)
    expected = top_of(x @ state["encoder.weight"].T + state["encoder.bias"], 4)
    assert (expected < 0).any()
    x_hat_expected = expected @ state["decoder.weight"].T + state["decoder.bias"]
    assert identify_command.main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "opens here: yes" in said and "relu: False, unlike what is trained here" in said
    assert convert_command.main([str(folder), str(tmp_path / "ours")]) == 0
    assert "folded: b_dec" in capsys.readouterr().out
    assert not (tmp_path / "ours" / "sae").exists()
    for sae in (
        plain_form(load(folder)[1]),
        load_sae(tmp_path / "ours"),
        load_sae(tmp_path / "ours" / "checkpoint.pt"),
    ):
        with torch.no_grad():
            x_hat, f = sae.run(x)
        torch.testing.assert_close(f, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x_hat, x_hat_expected, rtol=1e-5, atol=1e-5)
        assert sae.metadata["model_name"] == "gpt2" and sae.metadata["hook_name"] == "blocks.8.hook_resid_pre"
    # and what only it can hold is refused elsewhere
    assert convert_command.main([str(folder), str(tmp_path / "no"), "--to", "saelens"]) == 2
    assert "keeps negative entries" in capsys.readouterr().err
    convert(tmp_path / "ours", tmp_path / "back", to="mech_platform")
    assert torch.equal(
        load_file(tmp_path / "back" / "sae_weights.safetensors")["decoder.weight"], state["decoder.weight"]
    )


@pytest.mark.parametrize("name", WITHOUT)
def test_without_relu_into_ours_and_back_no_bit_changes(name: str, tmp_path: Path):
    loaded = make("topk", relu=False)
    assert FORMATS["mechint"].holds(loaded) is None
    assert FORMATS["mechint"].write
    FORMATS["mechint"].write(loaded, tmp_path / "x")
    back = read("mechint", tmp_path / "x")
    assert not back.relu and back.k == loaded.k and back.metadata == loaded.metadata
    assert all(torch.equal(back.weights()[key], tensor) for key, tensor in loaded.weights().items())
    bare = loaded.variant(apply_b_dec_to_input=False)
    again = read(name, write(name, bare, tmp_path))
    assert all(torch.equal(again.weights()[key], tensor) for key, tensor in loaded.weights().items())


# --- with ReLU, into formats without ----------------------------------------------------------------------------------


def rarely_positive(d_in: int = 6, d_sae: int = 20, k: int = 8, seed: int = 0, **changes: Any) -> SAE:
    """With ReLU; fewer than k of its pre-activations are above 0, so that the ReLU matters."""
    loaded = make("topk", d_in, d_sae, seed, apply_b_dec_to_input=False)
    tensors = {**loaded.weights(), "b_enc": loaded.weights()["b_enc"] - 3.0}
    return loaded.variant(tensors=tensors, k=k, **changes)


@pytest.mark.parametrize("name", WITHOUT)
def test_it_is_refused_unless_padding_is_asked_for(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    loaded = rarely_positive()
    assert not certify(loaded, loaded.variant(relu=False)).holds  # it would be another function
    write_proved(loaded, tmp_path / "in", FORMATS["saelens"])
    out = tmp_path / ("sae.pt" if name == "saev" else "out")
    assert convert_command.main([str(tmp_path / "in"), str(out), "--to", name]) == 2
    assert "--pad-topk" in capsys.readouterr().err and not out.exists()
    assert convert_command.main([str(tmp_path / "in"), str(out), "--to", name, "--pad-topk"]) == 0
    assert "added_latents: 8" in capsys.readouterr().out
    place = out.with_name("sae.pt.certificate.json") if name == "saev" else out / "certificate.json"
    record = json.loads(place.read_text())
    assert record["added_latents"] == 8 and record["weights_equal"] and record["holds"]
    # the same sums in float64, over eight more latents that add nothing
    assert max(record["encode_difference"], record["decode_difference"]) < 1e-14
    assert any("last 8 latents are of zeros" in note for note in record["notes"])
    # what the tool computes from the file
    back = read(name, out)
    assert back.d_sae == 28 and not back.relu and silent_latents(back) == 8
    x, f, _ = codes(loaded)
    d = {key: tensor.double() for key, tensor in back.weights().items()}
    found = top_of(x @ d["W_enc"] + d["b_enc"], 8)
    assert torch.equal(found[:, 20:], torch.zeros(len(x), 8, dtype=x.dtype))
    torch.testing.assert_close(found[:, :20], f, rtol=1e-12, atol=1e-12)
    assert ((f != 0).sum(dim=1) < 8).any()
    # from there it goes into formats with ReLU too, for it is the same with it
    convert(out, tmp_path / "again", to="saelens")
    assert load(tmp_path / "again")[1].relu


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 20), st.data())
def test_padding_changes_no_code(d_in: int, d_sae: int, data: st.DataObject):
    k = data.draw(st.integers(1, d_sae))
    rescale = data.draw(st.booleans())
    loaded = rarely_positive(d_in, d_sae, k, data.draw(st.integers(0, 99)), rescale_acts_by_decoder_norm=rescale)
    padded = pad_topk(loaded).variant(relu=False)
    x = 3 * torch.randn(20, d_in, generator=torch.Generator().manual_seed(4))
    found, expected = reference_encode(padded, x), reference_encode(loaded, x)
    torch.testing.assert_close(found[:, :d_sae], expected, rtol=1e-12, atol=1e-12)
    assert not found[:, d_sae:].any()


def test_padding_is_for_a_topk_with_relu_that_needs_it(tmp_path: Path):
    loaded = rarely_positive()
    assert held_variant(loaded, FORMATS["saelens"], pad=True)[0].d_sae == 20  # not needed there
    with pytest.raises(MechintError, match="gated"):
        held_variant(make("gated"), FORMATS["saev"], pad=True)
    for other in (make("gated"), loaded.variant(relu=False)):
        with pytest.raises(MechintError, match="--pad-topk is for a topk with ReLU"):
            pad_topk(other)
    with pytest.raises(MechintError, match="only standard and jumprelu"):
        held_variant(loaded, FORMATS["gemma_scope"], pad=True)


def test_latents_that_are_added_have_to_be_silent():
    loaded = rarely_positive()
    padded = pad_topk(loaded).variant(relu=False)
    assert certify(loaded, padded).holds
    loud = {**padded.weights(), "b_enc": padded.weights()["b_enc"].clone()}
    loud["b_enc"][-1] = 0.01
    assert not certify(loaded, padded.variant(tensors=loud)).holds
    with pytest.raises(MechintError, match="widths differ"):
        certify(padded, loaded)


def test_export_of_a_topk_run_to_a_format_without_relu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_checkpoint(build_sae("topk", 5, 20, options={"k": 3}), tmp_path / "run" / "checkpoint.pt")
    (tmp_path / "run" / "config.json").write_text("{}")
    flags = ["--run-dir", str(tmp_path / "run"), "--format", "saev"]
    assert export_command.main(flags) == 2
    assert "--pad-topk" in capsys.readouterr().err
    assert export_command.main([*flags, "--pad-topk"]) == 0
    said = capsys.readouterr().out
    assert "added_latents: 3" in said and "note: the last 3 latents are of zeros" in said
    assert read("saev", tmp_path / "run" / "exports" / "saev").d_sae == 23


def test_openai_holds_a_topk_with_relu_on_layer_normed_inputs_only(tmp_path: Path):
    """Its library layer-normalises the inputs of every TopK, and of nothing else; ReLU after top-k is its default."""
    loaded = make("topk", normalize_activations="layer_norm")
    path = write("openai", loaded, tmp_path)
    state = torch.load(path, weights_only=True)
    assert state["activation"] == "TopK"
    assert state["activation_state_dict"] == {"k": loaded.saved_options()["k"], "postact_fn": "ReLU"}
    assert read("openai", path).relu
    with pytest.raises(MechintError, match="layer-normalises"):
        held_variant(make("topk"), FORMATS["openai"], pad=True)
    with pytest.raises(MechintError, match="ReLU alone"):
        held_variant(make("topk"), FORMATS["mistudio"])
