"""Our files in SAELens, and SAELens's files here. Runs where SAELens is: `make test-peers` (SAELens 6.54.12).

Both sides compute in float32; what they may differ by is the rounding of sums in another order.
"""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mechint.errors import MechintError
from mechint.formats import FORMATS, plain_form, reference_decode, reference_encode
from mechint.formats.convert import convert, load, write_proved
from mechint.formats.folds import as_jumprelu, not_plain
from mechint.sae import SAE, build_sae, load_sae
from mechint.sae.config import NORMALIZE

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sae_lens") is None, reason="SAELens is not in this environment: `make test-peers`"
)

D_IN, D_SAE = 12, 40
SAES = ("standard", "topk", "jumprelu", "gated")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = float(expected.abs().max())
    assert scale > 0 and found.shape == expected.shape
    assert float((found.double() - expected.double()).abs().max()) <= tolerance * scale


def vectors() -> Tensor:
    return 2.0 * torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1))


def theirs(architecture: str, **cfg: Any) -> Any:
    """A SAELens module with random values in every tensor."""
    from sae_lens.registry import get_sae_class  # pyright: ignore[reportMissingImports]

    cls, config = get_sae_class(architecture)
    if "transcoder" in architecture:
        cfg |= {"d_out": D_IN + 3 if "skip" not in architecture else D_IN, "apply_b_dec_to_input": False}
    if architecture == "topk":
        cfg.setdefault("k", 7)
    sae = cls(config(d_in=D_IN, d_sae=D_SAE, **cfg))
    randomise(sae)
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    sae.cfg.metadata.model_name = "pythia-70m"
    return sae


def randomise(module: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values.abs() if name == "threshold" else values * (0.3 if name == "r_mag" else 1.0))


@torch.no_grad()
def both_agree(sae: Any, loaded: SAE, tolerance: float) -> None:
    """SAELens's module and our definition: codes, and the output for these codes."""
    x = vectors()
    f = sae.encode(x)
    close(f, reference_encode(loaded, x), tolerance)
    # its transcoders' decode leaves out the skip connection, which their forward adds
    out = sae(x) if loaded.is_transcoder else sae.decode(f)
    close(out, reference_decode(loaded, reference_encode(loaded, x), x), tolerance)


def saelens_opens(folder: Path) -> Any:
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    return SAE.load_from_disk(str(folder))


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("architecture", SAES)
def test_peer_saes_open_here(architecture: str, subtracts: bool, normalize: str, tmp_path: Path) -> None:
    sae = theirs(architecture, apply_b_dec_to_input=subtracts, normalize_activations=normalize)
    sae.save_model(tmp_path / "theirs")
    found, loaded = load(tmp_path / "theirs")
    assert found.name == "saelens" and loaded.cfg.normalize_activations == normalize
    both_agree(sae, loaded, 1e-6 if normalize == "none" else 1e-5)
    assert loaded.metadata["hook_name"] == "blocks.2.hook_resid_post" and loaded.metadata["processing"] == "raw"
    if not_plain(loaded) is None:
        convert(tmp_path / "theirs", tmp_path / "ours", to="mechint")
        mine, x = load_sae(tmp_path / "ours"), vectors()
        with torch.no_grad():
            close(mine.encode(x), sae.encode(x), 1e-5)
            close(mine(x), sae(x), 1e-5)
    # and what we write of it they open
    write_proved(loaded, tmp_path / "again", FORMATS["saelens"])
    both_agree(saelens_opens(tmp_path / "again"), loaded, 1e-6 if normalize == "none" else 1e-5)


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_peer_transcoders_both_ways(architecture: str, tmp_path: Path) -> None:
    sae = theirs(architecture)
    sae.save_model(tmp_path / "theirs")
    loaded = load(tmp_path / "theirs")[1]
    assert loaded.is_transcoder and ("W_skip" in loaded.weights()) == ("skip" in architecture)
    both_agree(sae, loaded, 1e-6)
    write_proved(loaded, tmp_path / "again", FORMATS["saelens"])
    again = saelens_opens(tmp_path / "again")
    assert again.cfg.architecture() == architecture
    both_agree(again, loaded, 1e-6)
    with pytest.raises(MechintError, match="transcoder"):
        convert(tmp_path / "theirs", tmp_path / "ours", to="mechint")


def test_peer_topk_by_decoder_norm(tmp_path: Path) -> None:
    sae = theirs("topk", rescale_acts_by_decoder_norm=True)
    sae.save_model(tmp_path / "theirs")
    loaded = load(tmp_path / "theirs")[1]
    both_agree(sae, loaded, 1e-6)
    certificate, _ = convert(tmp_path / "theirs", tmp_path / "old", to="saelens_pre6")
    assert certificate.folded == ("decoder norms",)
    both_agree(saelens_opens(tmp_path / "old"), loaded, 1e-5)
    with torch.no_grad():
        close(plain_form(loaded)(vectors()), sae(vectors()), 1e-5)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_peer_batchtopk_checkpoints_and_inference_models(architecture: str, rescale: bool, tmp_path: Path) -> None:
    from sae_lens.registry import get_sae_training_class  # pyright: ignore[reportMissingImports]

    cls, config = get_sae_training_class(architecture)
    extra = {"matryoshka_widths": [10, D_SAE]} if "matryoshka" in architecture else {}
    sae = cls(config(d_in=D_IN, d_sae=D_SAE, k=6, rescale_acts_by_decoder_norm=rescale, **extra))
    randomise(sae)
    sae.topk_threshold = torch.tensor(2.5, dtype=torch.float64)
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    inference = saelens_opens(tmp_path / "inference")
    both_agree(inference, load(tmp_path / "inference")[1], 1e-6)
    training = load(tmp_path / "training")[1]
    assert training.architecture == "jumprelu"
    both_agree(inference, training, 1e-5)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu"])
def test_peer_checkpoints_of_a_training_open_as_what_is_trained(
    architecture: str, rescale: bool, tmp_path: Path
) -> None:
    """cfg.json as its training classes write it, with their own settings beside those of the SAE."""
    from sae_lens.registry import get_sae_training_class  # pyright: ignore[reportMissingImports]

    cls, config = get_sae_training_class(architecture)
    extra: dict[str, Any] = {"k": 6, "rescale_acts_by_decoder_norm": rescale} if architecture == "topk" else {}
    sae = cls(config(d_in=D_IN, d_sae=D_SAE, **extra))
    randomise(sae)
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    for place in ("training", "inference"):
        found, loaded = load(tmp_path / place)
        assert found.name == "saelens" and loaded.architecture == architecture
        both_agree(saelens_opens(tmp_path / "inference") if place == "inference" else sae, loaded, 1e-5)


@pytest.mark.parametrize("architecture", SAES)
def test_a_constant_input_scale_is_what_peer_folds(architecture: str, tmp_path: Path) -> None:
    """Its files name the normalisation, its registry the factor; with the factor in the file both agree."""
    sae = theirs(architecture, normalize_activations="expected_average_only_in")
    sae.save_model(tmp_path / "theirs")
    cfg = json.loads((tmp_path / "theirs" / "cfg.json").read_text())
    with pytest.raises(MechintError, match="norm_scaling_factor"):
        load(tmp_path / "theirs")
    (tmp_path / "theirs" / "cfg.json").write_text(json.dumps({**cfg, "norm_scaling_factor": 0.3}))
    loaded = load(tmp_path / "theirs")[1]
    assert loaded.cfg.input_scale == 0.3
    sae.fold_activation_norm_scaling_factor(0.3)
    both_agree(sae, loaded, 1e-5)
    certificate, _ = convert(tmp_path / "theirs", tmp_path / "again", to="saelens")
    assert certificate.folded == ("input scale",)
    both_agree(saelens_opens(tmp_path / "again"), loaded, 1e-5)


def test_sparsity_stays_beside_the_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs("standard").save_model(tmp_path / "theirs")
    save_file({"sparsity": torch.linspace(-9, 0, D_SAE)}, tmp_path / "theirs" / "sparsity.safetensors")
    convert(tmp_path / "theirs", tmp_path / "again", to="saelens")
    saelens_opens(tmp_path / "again")
    kept = load_file(tmp_path / "again" / "sparsity.safetensors")["sparsity"]
    assert torch.equal(kept, torch.linspace(-9, 0, D_SAE))


# --- Gemma Scope, which SAELens reads with loaders of its own ---------------------------------------------------------


def through_its_loader(name: str, repo_id: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The SAE that SAELens makes of a folder, which stands for one on the Hub."""
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]
    from sae_lens.loading import pretrained_sae_loaders as loaders  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file

    def download(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        place = folder.parent / (f"{subfolder}/{filename}" if subfolder else filename)
        assert place.is_file()
        return str(place)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        return {key: list(value.shape) for key, value in load_file(folder.parent / filename).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    widths = {"d_in": D_IN, "d_sae": D_SAE}
    cfg, state, _ = getattr(loaders, name)(repo_id, folder.name, cfg_overrides=widths)
    sae = SAE.from_dict(loaders.handle_config_defaulting(cfg))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    return sae


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_its_loader_of_gemma_scope_reads_what_we_write(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = build_sae(architecture, D_IN, D_SAE)
    randomise(sae)
    loaded = sae.saved_form()
    if architecture == "standard":  # its loader knows JumpReLU alone
        loaded = as_jumprelu(loaded)
    folder = tmp_path / "layer_20_width_16k"
    certificate, _ = write_proved(loaded, folder / "params.npz", FORMATS["gemma_scope"])
    assert certificate.folded == ("b_dec",)
    found = through_its_loader("gemma_2_sae_huggingface_loader", "g/gemma-scope-2b-pt-res", folder, monkeypatch)
    both_agree(found, loaded, 1e-5)
    both_agree(found, load(folder)[1], 1e-6)


@pytest.mark.parametrize("kind", ["jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_its_loader_of_gemma_scope_2_reads_what_we_write(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = theirs(kind, **({} if "transcoder" in kind else {"apply_b_dec_to_input": False}))
    sae.cfg.metadata.model_name = "gemma-3-1b-pt"
    sae.save_model(tmp_path / "theirs")
    folder = tmp_path / ("layer_2_transcoder" if "transcoder" in kind else "resid_post_layer_2")
    certificate, _ = convert(tmp_path / "theirs", folder, to="gemma_scope_2")
    assert certificate.weights_equal
    found = through_its_loader("gemma_3_sae_huggingface_loader", "g/gemma-scope-2-1b-pt", folder, monkeypatch)
    assert found.cfg.architecture() == kind
    both_agree(found, load(folder)[1], 1e-6)
    with torch.no_grad():
        close(found(vectors()), sae(vectors()), 1e-6)


@pytest.mark.parametrize("architecture", [*SAES, "batchtopk", "matryoshka_batchtopk"])
def test_ours_open_in_peer_with_their_metadata(architecture: str, tmp_path: Path) -> None:
    options = {"k": 5} if "topk" in architecture else {}
    options |= {"widths": (10, D_SAE)} if "matryoshka" in architecture else {}
    sae = build_sae(architecture, D_IN, D_SAE, options=options).saved_form()
    randomise(sae)
    sae.metadata = {"hook_name": "blocks.3.hook_resid_post", "model_name": "pythia-70m", "prepend_bos": True}
    sae.save_model(tmp_path / "run")
    opened = saelens_opens(tmp_path / "run")
    assert opened.cfg.metadata.hook_name == "blocks.3.hook_resid_post" and opened.cfg.metadata.prepend_bos is True
    with torch.no_grad():
        x_hat, f = sae.run(vectors())
        close(opened.encode(vectors()), f, 1e-6)
        close(opened(vectors()), x_hat, 1e-6)
    both_agree(opened, sae.saved_form(), 1e-6)


@pytest.mark.parametrize("architecture", SAES)
def test_pre_6_files_mean_in_peer_what_they_mean_here(architecture: str, tmp_path: Path) -> None:
    sae = build_sae(architecture, D_IN, D_SAE, options={"k": 5} if architecture == "topk" else {})
    randomise(sae)
    sae.metadata = {"hook_name": "blocks.3.hook_resid_post", "model_name": "pythia-70m", "processing": "raw"}
    loaded = sae.saved_form()
    forms = {"plain": loaded, "bare": loaded.variant(apply_b_dec_to_input=False)}
    forms |= {
        "constant_norm_rescale": loaded.variant(normalize_activations="constant_norm_rescale"),
        "layer_norm": loaded.variant(normalize_activations="layer_norm"),
    }
    for name, given in forms.items():
        write_proved(given, tmp_path / name, FORMATS["saelens_pre6"])
        opened = saelens_opens(tmp_path / name)
        assert opened.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
        both_agree(opened, given, 1e-6 if given.cfg.normalize_activations == "none" else 1e-5)
        both_agree(opened, load(tmp_path / name)[1], 1e-6 if given.cfg.normalize_activations == "none" else 1e-5)


def test_hook_z_files_of_peer_keep_their_reshaping(tmp_path: Path) -> None:
    sae = theirs("standard", reshape_activations="hook_z")
    sae.cfg.metadata.hook_name = "blocks.2.attn.hook_z"
    sae.save_model(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "again", to="saelens")
    assert json.loads((tmp_path / "again" / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    heads = vectors().view(8, 8, 3, 4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        close(saelens_opens(tmp_path / "again")(heads), sae(heads), 1e-6)


def test_peer_opens_bfloat16_files_as_we_do(tmp_path: Path) -> None:
    sae = theirs("jumprelu").to(torch.bfloat16)
    sae.save_model(tmp_path / "theirs")
    loaded = load(tmp_path / "theirs")[1]
    assert all(tensor.dtype == torch.float32 for tensor in loaded.weights().values())
    both_agree(sae.to(torch.float32), loaded, 1e-6)
