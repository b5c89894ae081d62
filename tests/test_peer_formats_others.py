"""Files of dictionary_learning 0.1.0 and sparsify 1.3.3 here, and ours there. Runs where they are: `make test-peers`.

Each library writes and reads with its own code; dictionary_learning's trainers supply the config.json. Both sides
compute in float32; what they may differ by is the rounding of sums in another order, and of what was folded.
"""

import contextlib
import importlib.util
import io
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mechint.formats import FORMATS, plain_form, reference_decode, reference_encode
from mechint.formats.convert import load, write_proved
from mechint.sae import SAE, build_sae

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not in this environment")
    for name in ("dictionary_learning", "sparsify")
]

D_IN, D_SAE, K = 12, 40, 7
# What the biases do to a pre-activation is folded in float32: compare their test of SAELens.
EXACT, FOLDED = 1e-6, 1e-5


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = float(expected.abs().max())
    assert scale > 0 and found.shape == expected.shape
    assert float((found.double() - expected.double()).abs().max()) <= tolerance * scale


def vectors() -> Tensor:
    return 2.0 * torch.randn(64, D_IN, generator=torch.Generator().manual_seed(1))


def randomise(module: Any, *, unit_rows: Tensor | None = None) -> None:
    """Random values everywhere, so that a forgotten tensor shows; thresholds above 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                values = 0.5 * torch.randn(tensor.shape, generator=generator)
                tensor.copy_(values.abs() if "threshold" in name else values)
        if unit_rows is not None:
            unit_rows.div_(unit_rows.norm(dim=0, keepdim=True))


def ours(architecture: str) -> SAE:
    sae = build_sae(architecture, D_IN, D_SAE, options={"k": K} if architecture == "topk" else {})
    randomise(sae)
    sae.renormalize_decoder()
    sae.metadata = {"hook_name": "blocks.3.hook_resid_post", "model_name": "pythia-70m", "processing": "raw"}
    return sae.saved_form()


def agrees(loaded: SAE, f: Tensor, x_hat: Tensor, tolerance: float) -> None:
    """Codes and reconstructions of `vectors()`, from the definition and, where it can be one, from our own module."""
    x = vectors()
    expected = reference_encode(loaded, x)
    assert 0 < float((expected != 0).double().mean()) < 0.9
    close(f, expected, tolerance)
    close(x_hat, reference_decode(loaded, expected, x), tolerance)
    if not loaded.is_transcoder:
        with torch.no_grad():
            found, codes = plain_form(loaded).run(x)
        close(codes, f, FOLDED)
        close(found, x_hat, FOLDED)


# --- dictionary_learning ----------------------------------------------------------------------------------------------


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """The parts of it that make, save and load dictionaries; its readers of models and of archives are not used."""
    import datasets  # noqa: F401  # looks for zstandard itself, before there is a stand-in

    for name in ("nnsight", "zstandard"):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            stand_in = types.ModuleType(name)
            stand_in.LanguageModel = object  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, stand_in)
    from dictionary_learning import dictionary, utils  # pyright: ignore[reportMissingImports]
    from dictionary_learning.trainers import (  # pyright: ignore[reportMissingImports]
        batch_top_k,
        gdm,
        jumprelu,
        matryoshka_batch_top_k,
        standard,
        top_k,
    )

    common: dict[str, Any] = {"steps": 10, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "lm_name": "pythia"}
    common |= {"device": "cpu", "submodule_name": "resid_post_layer_3", "lr": 1e-3, "warmup_steps": 1}
    trainers: dict[str, Callable[[], Any]] = {
        "standard": lambda: standard.StandardTrainer(**common, sparsity_warmup_steps=1),
        "april": lambda: standard.StandardTrainerAprilUpdate(**common, sparsity_warmup_steps=1),
        "gated": lambda: gdm.GatedSAETrainer(**common, sparsity_warmup_steps=1),
        "jumprelu": lambda: jumprelu.JumpReluTrainer(**common, sparsity_warmup_steps=1),
        "topk": lambda: top_k.TopKTrainer(**common, k=K),
        "batchtopk": lambda: batch_top_k.BatchTopKTrainer(**common, k=K),
        "matryoshka": lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer(
            **common, k=K, group_fractions=[0.25, 0.75]
        ),
    }
    yield types.SimpleNamespace(dictionary=dictionary, load=utils.load_dictionary, trainers=trainers)


def save_dictionary(module: Any, trainer: dict[str, Any], folder: Path) -> Path:
    """As its training ends."""
    folder.mkdir()
    torch.save({name: tensor.cpu() for name, tensor in module.state_dict().items()}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}, indent=4))
    return folder


@pytest.mark.parametrize("kind", ["standard", "april", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"])
def test_what_dictionary_learning_trains_opens_here(kind: str, library: types.SimpleNamespace, tmp_path: Path):
    trainer = library.trainers[kind]()
    decoder = trainer.ae.decoder.weight.data if hasattr(trainer.ae, "decoder") else None
    randomise(trainer.ae, unit_rows=decoder)
    folder = save_dictionary(trainer.ae, trainer.config, tmp_path / kind)
    with torch.no_grad():
        module = library.load(str(folder), "cpu")[0]
        f = module.encode(vectors())
        x_hat = module.decode(f)
    form, loaded = load(folder)
    assert form.name == "dictionary_learning" and loaded.notes == ()
    assert loaded.metadata["hook_name"] == "blocks.3.hook_resid_post"
    agrees(loaded, f, x_hat, EXACT)


def test_an_autoencoder_of_free_norms_reconstructs_the_same(library: types.SimpleNamespace, tmp_path: Path):
    """The library multiplies its latents by the norms while it loads it: that is said, and nothing else differs."""
    trainer = library.trainers["standard"]()
    randomise(trainer.ae)
    folder = save_dictionary(trainer.ae, trainer.config, tmp_path / "free")
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        f_raw = trainer.ae.encode(vectors())
        x_hat = library.load(str(folder), "cpu")[0](vectors())
    loaded = load(folder)[1]
    assert "unit norm" in loaded.notes[0]
    agrees(loaded, f_raw, x_hat, 3 * EXACT)


def test_the_april_architecture_opens_here(library: types.SimpleNamespace, tmp_path: Path):
    module = library.dictionary.AutoEncoderNew(D_IN, D_SAE)
    randomise(module)
    folder = save_dictionary(module, {"dict_class": "AutoEncoderNew"}, tmp_path / "new")
    with torch.no_grad():
        f = library.load(str(folder), "cpu")[0].encode(vectors())
        agrees(load(folder)[1], f, module.decode(f), EXACT)


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_what_we_write_dictionary_learning_loads(architecture: str, library: types.SimpleNamespace, tmp_path: Path):
    loaded = ours(architecture)
    certificate, _ = write_proved(loaded, tmp_path / "out", FORMATS["dictionary_learning"])
    assert certificate.folded == (("b_dec",) if architecture == "jumprelu" else ())
    with torch.no_grad():
        module = library.load(str(tmp_path / "out"), "cpu")[0]
        f = module.encode(vectors())
        agrees(loaded, f, module.decode(f), FOLDED if certificate.folded else EXACT)


def test_free_norms_are_written_as_what_the_library_leaves_alone(library: types.SimpleNamespace, tmp_path: Path):
    loaded = ours("standard")
    loaded.weights()["W_dec"].mul_(3.0)
    write_proved(loaded, tmp_path / "out", FORMATS["dictionary_learning"])
    with torch.no_grad():
        module = library.load(str(tmp_path / "out"), "cpu")[0]
        f = module.encode(vectors())
        assert type(module).__name__ == "AutoEncoderNew"
        agrees(loaded, f, module.decode(f), FOLDED)


def test_batchtopk_with_its_k_stays_batchtopk(library: types.SimpleNamespace, tmp_path: Path):
    trainer = library.trainers["batchtopk"]()
    randomise(trainer.ae)
    loaded = load(save_dictionary(trainer.ae, trainer.config, tmp_path / "theirs"))[1]
    certificate, _ = write_proved(loaded, tmp_path / "out", FORMATS["dictionary_learning"])
    assert certificate.weights_equal
    module = library.load(str(tmp_path / "out"), "cpu")[0]
    for name, tensor in trainer.ae.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_what_we_train_by_batch_is_written_as_its_batchtopk(
    architecture: str, library: types.SimpleNamespace, tmp_path: Path
):
    """One threshold, b_dec subtracted, the k of the training: nothing is folded."""
    options = {"k": K} | ({"widths": (10, D_SAE)} if "matryoshka" in architecture else {})
    sae = build_sae(architecture, D_IN, D_SAE, options=options).saved_form()
    randomise(sae)
    sae.renormalize_decoder()
    with torch.no_grad():
        sae.get_parameter("threshold").fill_(0.7)
    loaded = sae.saved_form()
    certificate, _ = write_proved(loaded, tmp_path / "out", FORMATS["dictionary_learning"])
    assert certificate.folded == () and certificate.weights_equal
    with torch.no_grad():
        module = library.load(str(tmp_path / "out"), "cpu")[0]
        assert type(module).__name__ == "BatchTopKSAE"
        f = module.encode(vectors(), use_threshold=True)
        agrees(loaded, f, module.decode(f), EXACT)


# --- sparsify ---------------------------------------------------------------------------------------------------------


def sparse_coder(**settings: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):  # it says which decoder it chose
        from sparsify.config import SparseCoderConfig  # pyright: ignore[reportMissingImports]
        from sparsify.sparse_coder import SparseCoder  # pyright: ignore[reportMissingImports]

    coder = SparseCoder(D_IN, SparseCoderConfig(**settings))
    randomise(coder)
    return coder


def through(coder: Any) -> tuple[Tensor, Tensor]:
    """`(feature_acts, output)` of `vectors()`, as its forward pass computes them."""
    x = vectors()
    with torch.no_grad():
        top = coder.encode(x)
        f = torch.zeros(len(x), coder.num_latents).scatter_(1, top.top_indices, top.top_acts)
        return f, coder(x).sae_out


@pytest.mark.parametrize(
    "settings",
    [
        {"num_latents": D_SAE, "k": K},
        {"expansion_factor": 4, "k": 3},
        {"num_latents": D_SAE, "k": K, "transcode": True},
        {"num_latents": D_SAE, "k": K, "transcode": True, "skip_connection": True},
    ],
    ids=["topk", "expansion_factor", "transcoder", "skip"],
)
def test_what_sparsify_saves_opens_here_and_goes_back(settings: dict[str, Any], tmp_path: Path):
    coder = sparse_coder(**settings)
    folder = tmp_path / "layers.3"
    coder.save_to_disk(folder)
    f, out = through(coder)
    form, loaded = load(folder)
    assert form.name == "sparsify"
    assert loaded.metadata["hook_name"] == "blocks.3.hook_resid_post"
    agrees(loaded, f, out, EXACT)
    certificate, _ = write_proved(loaded, tmp_path / "out" / "layers.3", FORMATS["sparsify"])
    assert certificate.weights_equal
    back = type(coder).load_many(str(tmp_path / "out"), local=True)["layers.3"]
    for name, tensor in coder.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    f_back, out_back = through(back)
    assert torch.equal(f_back, f) and torch.equal(out_back, out)


def test_what_we_write_sparsify_loads(tmp_path: Path):
    loaded = ours("topk")
    certificate, _ = write_proved(loaded, tmp_path / "layers.3", FORMATS["sparsify"])
    assert certificate.folded == () and certificate.weights_equal
    coder = type(sparse_coder(k=K)).load_from_disk(tmp_path / "layers.3")
    f, out = through(coder)
    agrees(loaded, f, out, EXACT)
    x = vectors()
    assert float((f != 0).sum(dim=1).double().max()) <= K and f.shape == (len(x), D_SAE)
