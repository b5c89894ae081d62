"""Formats: the definition, the folds, certificates, and what convert, identify and export do with files."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechint.cli import convert as convert_command
from mechint.cli import export as export_command
from mechint.cli import formats_page
from mechint.cli import identify as identify_command
from mechint.errors import MechintError
from mechint.formats import FORMATS, plain_form, reference_decode, reference_encode
from mechint.formats.certificate import certify
from mechint.formats.convert import convert, held_variant, identify, load
from mechint.formats.folds import as_jumprelu, as_standard, fold_b_dec, fold_norms, fold_scale, not_plain, variants
from mechint.sae import SAE, build_sae, load_sae, save_checkpoint
from mechint.sae.config import NORMALIZE

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("standard", "topk", "jumprelu", "gated")
OFFSETS = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}


def make(architecture: str, d_in: int = 6, d_sae: int = 20, seed: int = 0, **changes: Any) -> SAE:
    """A random SAE with free decoder norms and no bias at 0."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes |= dict.fromkeys(OFFSETS.get(architecture, ("b_enc",)), (d_sae,))
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if architecture == "jumprelu":
        tensors["threshold"] = tensors["threshold"].abs()
    if changes.get("transcoder"):
        changes["apply_b_dec_to_input"] = False
        if seed % 2:  # every other one with a skip connection
            tensors["W_skip"] = torch.randn(d_in, d_in, generator=generator)
    options = {"k": max(1, d_sae // 4)} if architecture == "topk" else {}
    if architecture != "topk":
        changes.pop("relu", None)
    metadata = {"hook_name": "blocks.1.hook_resid_post", "model_name": "m", "processing": "raw", "prepend_bos": True}
    return SAE.from_tensors(architecture, tensors, "made", metadata=metadata, **options, **changes)


def settings_of(sae: SAE) -> dict[str, Any]:
    """What a file says of an SAE beside its tensors and its origin."""
    cfg = sae.cfg.to_dict()
    return {key: value for key, value in cfg.items() if key not in ("metadata", "device", "reshape_activations")}


def inputs(loaded: SAE, n: int = 40) -> Tensor:
    return 2.0 * torch.randn(n, loaded.d_in, generator=torch.Generator().manual_seed(9))


def assert_same_function(before: SAE, after: SAE, tolerance: float = 1e-5) -> None:
    x = inputs(before)
    f = reference_encode(before, x)
    assert (f != 0).any()
    torch.testing.assert_close(reference_encode(after, x), f, rtol=tolerance, atol=tolerance * float(f.abs().max()))
    expected = reference_decode(before, f, x)
    found = reference_decode(after, reference_encode(after, x), x)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


# --- the definition and the folds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [*KINDS, "batchtopk", "matryoshka_batchtopk"])
def test_the_definition_is_what_our_modules_compute(architecture: str) -> None:
    options = {"k": 4} if "topk" in architecture else {}
    sae = build_sae(architecture, 6, 20, options=options, generator=torch.Generator().manual_seed(1)).saved_form()
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.add_(0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    loaded = sae.saved_form()
    x = inputs(loaded)
    with torch.no_grad():
        x_hat, f = sae.run(x)
    torch.testing.assert_close(reference_encode(loaded, x).float(), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference_decode(loaded, f, x).float(), x_hat, rtol=1e-5, atol=1e-5)
    again = plain_form(loaded)
    assert again.architecture == sae.architecture
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("architecture", KINDS)
def test_folds_keep_the_function(architecture: str) -> None:
    loaded = make(architecture, input_scale=3.0, apply_b_dec_to_input=False, rescale_acts_by_decoder_norm=False)
    assert_same_function(loaded, fold_scale(loaded))
    assert_same_function(loaded, fold_b_dec(loaded, apply_b_dec_to_input=True))
    ours = plain_form(loaded)
    assert (ours.cfg.input_scale, ours.cfg.apply_b_dec_to_input) == (1.0, True)
    assert_same_function(loaded, ours)
    assert_same_function(loaded, fold_b_dec(ours, apply_b_dec_to_input=False))
    for variant, _ in variants(loaded):
        assert_same_function(loaded, variant)


def test_decoder_norms_fold_and_weak_settings_do_not_pass_for_nothing() -> None:
    loaded = make("topk", rescale_acts_by_decoder_norm=True)
    folded = fold_norms(loaded)
    assert_same_function(loaded, folded)
    torch.testing.assert_close(folded.weights()["W_dec"].norm(dim=1), torch.ones(20))
    # each setting changes the function: leaving it out instead of folding it would be seen
    for plain, changed in (
        (loaded, loaded.variant(rescale_acts_by_decoder_norm=False)),
        (make("standard"), make("standard", input_scale=2.0)),
        (make("standard"), make("standard", normalize_activations="constant_norm_rescale")),
        (make("standard"), make("standard", normalize_activations="layer_norm")),
        (make("gated"), make("gated", apply_b_dec_to_input=False)),
        (make("topk").variant(k=18), make("topk", relu=False).variant(k=18)),
    ):
        certificate = certify(plain, changed)
        assert max(certificate.encode_difference, certificate.decode_difference) > 1e-3
        assert not certificate.holds


def test_relu_and_jumprelu_at_zero_are_the_same() -> None:
    loaded = make("standard")
    jump = as_jumprelu(loaded)
    assert_same_function(loaded, jump, 0.0)
    assert as_standard(jump).architecture == "standard"
    below = jump.variant(tensors={**jump.weights(), "threshold": torch.full((20,), -0.5)})
    assert_same_function(below, plain_form(below), 0.0)


@pytest.mark.parametrize(
    "changes",
    [{"normalize_activations": kind} for kind in NORMALIZE[1:]] + [{"transcoder": True}],
)
def test_what_no_weights_can_say_is_refused(changes: dict[str, Any]) -> None:
    sae = make("topk", **changes)
    assert not_plain(sae) and not_plain(plain_form(sae)) == not_plain(sae)
    with pytest.raises(MechintError, match="would change"):
        held_variant(sae, FORMATS["mechint"])


# --- certificates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_probes_are_of_the_scale_of_the_sae(architecture: str, size: float) -> None:
    """An SAE of activations of any size fires on them, and a change of one weight is seen."""
    loaded = make(architecture, d_in=16, d_sae=64)
    names = ("b_dec", "b_enc", "threshold", "b_gate", "b_mag")
    scaled = {name: value * size if name in names else value for name, value in loaded.weights().items()}
    loaded = loaded.variant(tensors=scaled)
    same = certify(loaded, loaded)
    assert same.holds and same.weights_equal and (same.encode_difference, same.decode_difference) == (0.0, 0.0)
    assert 1 < same.mean_l0 < 60
    for name in loaded.weights():
        changed = {**loaded.weights(), name: loaded.weights()[name] * 1.01}
        certificate = certify(loaded, loaded.variant(tensors=changed))
        assert not certificate.holds and not certificate.weights_equal, name


def test_latents_switched_by_rounding_are_counted_apart() -> None:
    loaded = make("jumprelu", d_in=4, d_sae=8)
    tensors = {**loaded.weights(), "W_enc": torch.zeros(4, 8), "b_enc": torch.ones(8), "threshold": torch.ones(8)}
    loaded = loaded.variant(tensors=tensors)
    nearly = loaded.variant(tensors={**tensors, "threshold": torch.full((8,), 1 - 1e-7)})
    certificate = certify(loaded, nearly)
    assert certificate.at_border == 8 * certificate.n_probes and certificate.holds
    lower = loaded.variant(tensors={**tensors, "threshold": torch.full((8,), 0.9)})
    assert not certify(loaded, lower).holds


# --- every format -----------------------------------------------------------------------------------------------------

CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"apply_b_dec_to_input": False},
    {"input_scale": 2.5},
    {"normalize_activations": "constant_norm_rescale"},
    {"normalize_activations": "layer_norm"},
    {"transcoder": True},
)


@pytest.mark.parametrize("name", ["mechint", "saelens", "saelens_pre6"])
@settings(max_examples=15, deadline=None)
@given(
    architecture=st.sampled_from(KINDS),
    changes=st.sampled_from(CHANGES),
    d_in=st.integers(2, 9),
    d_sae=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_round_trips(
    name: str,
    architecture: str,
    changes: dict[str, Any],
    d_in: int,
    d_sae: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """What a format holds comes back to the bit, as the same kind, with what is known of its origin."""
    loaded = make(architecture, d_in, d_sae, seed, **changes)
    target = FORMATS[name]
    try:
        variant, folded = held_variant(loaded, target)
    except MechintError:
        return
    folder = tmp_path_factory.mktemp("round") / "x"
    assert target.write is not None and target.read is not None
    target.write(variant, folder)
    assert [found.name for found in FORMATS.values() if found.sniff(folder)] == [name]
    back = target.read(folder)
    assert back.weights().keys() == variant.weights().keys()
    assert all(torch.equal(back.weights()[key], variant.weights()[key]) for key in back.weights())
    assert settings_of(back) == settings_of(variant)
    assert {key: back.metadata[key] for key in loaded.metadata} == loaded.metadata
    assert folded == () or changes


@settings(max_examples=25, deadline=None)
@given(
    architecture=st.sampled_from(KINDS),
    changes=st.sampled_from((*CHANGES[:2], *CHANGES[3:], {"relu": False, "apply_b_dec_to_input": False})),
    one_threshold=st.booleans(),
    d_in=st.integers(2, 9),
    d_sae=st.integers(2, 30),
    seed=st.integers(0, 99),
)
def test_no_bit_changes_on_the_way_through_all_formats_that_hold_an_sae(
    architecture: str,
    changes: dict[str, Any],
    one_threshold: bool,
    d_in: int,
    d_sae: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """From each format into the next: between any two of them nothing is rounded."""
    loaded = make(architecture, d_in, d_sae, seed, **changes)
    if one_threshold and architecture == "jumprelu":
        same = loaded.weights()["threshold"].median().expand(d_sae).contiguous()
        loaded = loaded.variant(tensors={**loaded.weights(), "threshold": same})
    folder, passed = tmp_path_factory.mktemp("chain"), loaded
    for name, target in sorted(FORMATS.items()):
        if target.read is None or target.write is None or target.holds(loaded) is not None:
            continue
        path = folder / (name + (Path(target.file_name).suffix if target.file_name else ""))
        target.write(passed, path)
        assert [found.name for found in FORMATS.values() if found.sniff(path)] == [name]
        passed = target.read(path)
        assert passed.weights().keys() == loaded.weights().keys(), name
        assert all(torch.equal(passed.weights()[key], loaded.weights()[key]) for key in loaded.weights()), name
        assert passed.departing() == loaded.departing(), name
        certificate = certify(loaded, passed, n_probes=12)
        assert certificate.weights_equal and (certificate.encode_difference, certificate.decode_difference) == (0, 0)


def test_only_what_cannot_be_held_is_refused() -> None:
    held = {
        name: {
            (kind, *change) for kind in KINDS for change in (tuple(c) for c in CHANGES) if _holds(name, kind, change)
        }
        for name in ("mechint", "saelens", "saelens_pre6")
    }
    everything = {(kind, *change) for kind in KINDS for change in CHANGES}
    assert held["mechint"] == {
        found for found in everything if not {"normalize_activations", "transcoder"} & set(found)
    }
    assert held["saelens_pre6"] == {found for found in everything if "transcoder" not in found}
    assert everything - held["saelens"] == {("topk", "transcoder"), ("gated", "transcoder")}


def _holds(name: str, kind: str, change: tuple[str, ...]) -> bool:
    changes = next(found for found in CHANGES if tuple(found) == change)
    try:
        held_variant(make(kind, **changes), FORMATS[name])
    except MechintError:
        return False
    return True


# --- SAELens's files --------------------------------------------------------------------------------------------------


def write_cfg(folder: Path, loaded: SAE, tensors: dict[str, Tensor] | None = None, **cfg: Any) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors or loaded.weights(), folder / "sae_weights.safetensors")
    values = {"d_in": loaded.d_in, "d_sae": loaded.d_sae, "dtype": "float32", **cfg}
    (folder / "cfg.json").write_text(json.dumps(values))
    return folder


SIX = {"metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post"}}


def test_pre_6_keys(tmp_path: Path) -> None:
    loaded = make("standard")
    old = {"hook_point": "blocks.7.hook_resid_pre", "hook_point_layer": 7, "model_name": "gpt2-small"}
    found = load(write_cfg(tmp_path / "a", loaded, **old, normalize_activations=False))[1]
    assert found.metadata["hook_name"] == "blocks.7.hook_resid_pre" and found.metadata["hook_layer"] == 7
    assert found.cfg.apply_b_dec_to_input and found.cfg.normalize_activations == "none"
    kwargs = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    found = load(write_cfg(tmp_path / "b", loaded, **old, **kwargs, apply_b_dec_to_input=False))[1]
    assert (found.architecture, found.k, found.cfg.apply_b_dec_to_input) == ("topk", 5, False)
    found = load(write_cfg(tmp_path / "c", loaded, normalize_activations=True, norm_scaling_factor=0.5))[1]
    assert found.cfg.input_scale == 0.5
    factor = torch.linspace(0.5, 2, 20)
    tuned = {**loaded.weights(), "scaling_factor": factor}
    found = load(write_cfg(tmp_path / "d", loaded, tuned, finetuning_scaling_factor=True))[1]
    torch.testing.assert_close(found.weights()["W_dec"], loaded.weights()["W_dec"] * factor[:, None])


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        ({"activation_fn_str": "topk"}, "topk activation without k"),
        ({"activation_fn_str": "tanh-relu"}, "tanh-relu"),
        ({"normalize_activations": True}, "norm_scaling_factor"),
        ({**SIX, "architecture": "topk"}, "topk without k"),
        ({**SIX, "architecture": "topk", "k": 21}, "from 1 to d_sae = 20"),
        ({**SIX, "architecture": "topk", "k": "many"}, "needs k.*found 'many'"),
        ({**SIX, "architecture": "topk", "k": float("nan")}, "whole number"),
        ({**SIX, "architecture": "temporal"}, "unknown architecture 'temporal'; "),
        ({**SIX, "architecture": ["standard"]}, "should be a name"),
        ({**SIX, "architecture": "standard", "normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({**SIX, "architecture": "standard", "normalize_activations": {}}, "the weights have 6"),
        ({**SIX, "architecture": "jumprelu"}, "lacks threshold"),
        ({"sae_lens_version": "6.1", "metadata": ["hook_name"]}, "should be a JSON object, found list"),
        ({**SIX, "architecture": "batchtopk"}, "topk_threshold"),
        ({**SIX, "architecture": "skip_transcoder"}, "W_skip"),
        ({**SIX, "architecture": "standard", "d_in": 7}, "says d_in 7, but the weights have 6"),
    ],
)
def test_cfg_that_would_be_another_function_is_refused(tmp_path: Path, cfg: dict[str, Any], words: str) -> None:
    if cfg.get("normalize_activations") == {}:
        cfg = {**cfg, "d_in": 9}
    with pytest.raises(MechintError, match=words):
        load(write_cfg(tmp_path / "x", make("standard"), **cfg))


CONTRADICTIONS = [
    {"architecture": "batch_topk", "activation_fn_str": "topk"},
    {"architecture": "batchtopk", "activation_fn": "topk"},
    {"architecture": "jumprelu", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}},
    {"architecture": "gated", "activation_fn_str": "jumprelu"},
    {"architecture": "topk", "activation_fn_str": "relu", "k": 5},
    {"architecture": "standard", "activation_fn_str": "jumprelu"},
    {"activation_fn_str": "topk", "activation_fn": "relu", "activation_fn_kwargs": {"k": 5}},
    {"activation_fn_str": "topk", "k": 4, "activation_fn_kwargs": {"k": 5}},
    {"hook_name": "blocks.1.hook_resid_post", "metadata": {"hook_name": "blocks.2.hook_resid_post"}},
    {"model_name": "gpt2", "metadata": {"model_name": "pythia-70m"}},
    {**SIX, "architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}},
]


@pytest.mark.parametrize("cfg", CONTRADICTIONS)
def test_keys_that_contradict_each_other_are_both_named_and_none_believed(tmp_path: Path, cfg: dict[str, Any]) -> None:
    folder = write_cfg(tmp_path / "x", make("topk"), **cfg)
    with pytest.raises(MechintError, match="remove the one that is wrong") as error:
        load(folder)
    said = {key: value for key, value in cfg.items() if key not in ("metadata", "activation_fn_kwargs", "k")}
    assert all(str(value) in str(error.value) for value in said.values() if cfg.get("k") != 4)


def test_files_from_before_6_open_in_every_way(tmp_path: Path) -> None:
    folder = write_cfg(tmp_path / "x", make("topk"), activation_fn_str="topk", activation_fn_kwargs={"k": 5})
    assert load_sae(folder).architecture == "topk"
    convert(folder, tmp_path / "y")
    assert load_sae(tmp_path / "y").architecture == "topk"


def test_a_batchtopk_checkpoint_opens_as_what_it_is_applied_as(tmp_path: Path) -> None:
    loaded = make("topk")
    tensors = {**loaded.weights(), "topk_threshold": torch.tensor(1.5, dtype=torch.float64)}
    cfg = {**SIX, "architecture": "batchtopk", "k": 3.0, "rescale_acts_by_decoder_norm": True}
    found = load(write_cfg(tmp_path / "x", loaded, tensors, **cfg))[1]
    assert found.architecture == "jumprelu" and found.metadata["processing"] == "raw"
    x = inputs(loaded)
    t = loaded.weights()
    weighed = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * t["W_dec"].norm(dim=1)
    torch.testing.assert_close(reference_encode(found, x).float(), weighed * (weighed > 1.5), rtol=1e-5, atol=1e-5)


def test_our_own_files_are_told_from_saelens_ones(tmp_path: Path) -> None:
    sae = build_sae("standard", 4, 8)
    sae.metadata = {"hook_name": "blocks.0.hook_resid_post", "processing": "centred", "prepend_bos": True}
    sae.save_model(tmp_path / "ours")
    recorded = json.loads((tmp_path / "ours" / "cfg.json").read_text())["metadata"]
    assert recorded["sae_lens_version"].startswith("6.") and recorded["mechint_version"]
    assert load_sae(tmp_path / "ours").metadata == sae.metadata
    # Neither of ours that names no processing ...
    sae.metadata = {"hook_name": "blocks.0.hook_resid_post"}
    sae.save_model(tmp_path / "silent")
    assert "processing" not in load_sae(tmp_path / "silent").metadata  # what is not known stays so
    # ... nor one of SAELens's own is mistaken for the other.
    cfg = json.loads((tmp_path / "silent" / "cfg.json").read_text())
    del cfg["metadata"]["mechint_version"]
    (tmp_path / "silent" / "cfg.json").write_text(json.dumps(cfg))
    assert load_sae(tmp_path / "silent").metadata["processing"] == "raw"


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What a finished run holds of its SAE."""
    sae = build_sae("jumprelu", 8, 24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        sae.b_enc.normal_(generator=torch.Generator().manual_seed(4))
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(5))
    sae.metadata = {"hook_name": "blocks.0.hook_resid_post", "model_name": "m", "processing": "raw"}
    folder = tmp_path / "run"
    save_checkpoint(sae, folder / "checkpoint.pt")
    sae.save_model(folder / "sae")
    (folder / "config.json").write_text("{}")
    return folder


def test_convert_writes_a_certificate_and_overwrites_only_when_asked(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert convert_command.main([str(run_dir), str(out), "--to", "saelens"]) == 0
    assert "folded: nothing" in capsys.readouterr().out
    record = json.loads((out / "certificate.json").read_text())
    assert record["holds"] and record["weights_equal"] and record["encode_difference"] == 0.0
    assert record["format"] == "saelens" and record["source"]["format"] == "mechint"
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]
    assert convert_command.main([str(run_dir), str(out), "--to", "saelens"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert convert_command.main([str(run_dir), str(out), "--to", "saelens_pre6", "--overwrite"]) == 0
    assert identify(out).formats == ("saelens_pre6",)
    # a folder that is something else, or that holds something else, is never replaced
    (out / "mine.txt").write_text("mine")
    assert convert_command.main([str(run_dir), str(out), "--to", "saelens", "--overwrite"]) == 2
    assert "mine.txt" in capsys.readouterr().err and (out / "mine.txt").is_file()
    assert convert_command.main([str(out), str(run_dir), "--to", "mechint", "--overwrite"]) == 2
    assert (run_dir / "config.json").is_file()
    back = tmp_path / "back.pt"
    convert(out, back, to="mechint")
    assert torch.equal(load_sae(back).W_enc, load_sae(run_dir).W_enc)
    assert load_sae(back).metadata["hook_name"] == "blocks.0.hook_resid_post"
    assert json.loads((tmp_path / "back.pt.certificate.json").read_text())["source"]["format"] == "saelens_pre6"


def test_a_folder_of_several_is_converted_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layer in range(2):
        write_cfg(tmp_path / "release" / f"layer_{layer}", make("standard", seed=layer))
    with pytest.raises(MechintError, match="holds 2 SAEs; give one of them: layer_0, layer_1"):
        convert(tmp_path / "release", tmp_path / "one")
    assert convert_command.main([str(tmp_path / "release"), str(tmp_path / "all"), "--to", "saelens"]) == 0
    assert capsys.readouterr().out.count("certificate: ") == 2
    for layer in range(2):
        found = load(tmp_path / "all" / f"layer_{layer}")[1]
        assert torch.equal(found.weights()["W_enc"], make("standard", seed=layer).weights()["W_enc"])


def test_a_conversion_that_lies_is_not_kept(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = FORMATS["saelens"]
    write = honest.write
    assert write is not None

    def forgetful(loaded: SAE, path: Path) -> None:
        write(loaded.variant(tensors={**loaded.weights(), "threshold": loaded.weights()["threshold"] + 0.1}), path)

    monkeypatch.setitem(FORMATS, "saelens", replace(honest, write=forgetful))
    with pytest.raises(MechintError, match="computes something else"):
        convert(run_dir, tmp_path / "out", to="saelens")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"]


def test_identify_says_what_is_missing_and_hints_at_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_cfg(tmp_path / "sae", make("topk", d_in=768, d_sae=8), activation_fn_str="topk", k=2)
    assert identify_command.main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert "format: saelens_pre6" in said and "topk SAE, k 2, d_in 768, d_sae 8" in said
    assert "not said: model_name, hook_name" in said and "a hint only: gpt2, EleutherAI/pythia-160m" in said
    assert identify_command.main([str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"]["W_enc"] == [768, 8] and found["opens_here"] and "model_name" not in found["metadata"]
    assert identify_command.main([str(tmp_path)]) == 0  # a folder of several
    assert capsys.readouterr().out.strip() == str(folder)
    (folder / "cfg.json").unlink()
    assert identify_command.main([str(folder)]) == 2
    assert "which activation function" in capsys.readouterr().err
    assert identify_command.main([str(tmp_path / "none")]) == 2
    (tmp_path / "text.pt").write_text("not an SAE")
    assert identify_command.main([str(tmp_path / "text.pt")]) == 2


def test_what_is_only_assumed_is_not_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(build_sae("standard", 512, 8), tmp_path / "old.pt")
    assert identify_command.main([str(tmp_path / "old.pt")]) == 0
    said = capsys.readouterr().out
    assert (
        "processing: centred (assumed)" in said and "not said: model_name, hook_name, processing, prepend_bos" in said
    )
    assert "a hint only: EleutherAI/pythia-70m" in said and "note: " in said


def test_export_of_a_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_command.main(["--run-dir", str(run_dir)]) == 0
    assert load(run_dir / "exports" / "saelens")[1].metadata["hook_name"] == "blocks.0.hook_resid_post"
    assert export_command.main(["--run-dir", str(run_dir), "--format", "saelense"]) == 2
    assert "nearest: saelens" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mechint", "x.pt", "saelens", "saelens_pre6"])
def test_broken_and_hostile_files_are_one_line_of_error(name: str, run_dir: Path, tmp_path: Path) -> None:
    """Every file of an SAE cut, overwritten or replaced: an error of ours, or an SAE that is still whole."""
    place = tmp_path / "in" / ("x.pt" if name == "x.pt" else "x")
    name = "mechint" if name == "x.pt" else name
    _, certificate = convert(run_dir, place, to=name)
    certificate.unlink()
    whole = load(place)[1]
    generator = torch.Generator().manual_seed(0)
    seen = 0
    for path in [path for path in place.parent.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        cuts = torch.randint(len(content), (12,), generator=generator).tolist()
        broken = [content[:cut] for cut in cuts]
        broken += [content[:cut] + bytes(8) + content[cut + 8 :] for cut in cuts]
        broken += [b"", b"[" * 100_000, b"\xff" * 64, (2**62).to_bytes(8, "little") + content[8:]]
        for data in broken:
            path.write_bytes(data)
            for chosen in (None, name):
                try:
                    found = load(place, from_format=chosen)[1]
                    assert found.weights().keys() == whole.weights().keys()
                    assert (found.d_in, found.d_sae) == (whole.d_in, whole.d_sae)
                except MechintError as error:
                    assert "\n" not in str(error)
                    seen += 1
        path.write_bytes(content)
    assert seen > 20
    assert torch.equal(load(place)[1].weights()["W_enc"], whole.weights()["W_enc"])


def test_opening_does_not_import_transformer_lens(run_dir: Path) -> None:
    code = (
        "import sys; from mechint.formats.convert import load; from mechint.formats import plain_form\n"
        f"plain_form(load({str(run_dir)!r})[1])\n"
        "heavy = {'transformer_lens', 'transformers', 'datasets', 'pandas', 'torch._dynamo'}\n"
        "print(heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_page_of_formats_is_up_to_date() -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert text == formats_page.page(), "run `python -m mechint.cli.formats_page docs/formats.md`"
