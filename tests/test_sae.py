"""The canonical SAE against its formulas, and its files: what goes in comes out, and what is not an SAE is refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechint.errors import MechintError
from mechint.sae import (
    SAEloss,
    SparseAutoEncoder,
    StandardSAE,
    build_sae,
    load_sae,
    load_sae_checkpoint,
    save_checkpoint,
)


@pytest.fixture
def sae() -> StandardSAE:
    torch.manual_seed(0)
    sae = StandardSAE(16, 64)
    with torch.no_grad():
        sae.b_enc.normal_()
        sae.b_dec.normal_()
    return sae


def write_legacy(path: Path, d_in: int, d_sae: int) -> dict[str, torch.Tensor]:
    tensors = {
        "b_pre": torch.randn(d_in),
        "b_enc": torch.randn(d_sae),
        "W_enc": torch.randn(d_in, d_sae),
        "W_dec": torch.randn(d_sae, d_in),
    }
    torch.save(tensors, path)
    return tensors


def test_forward_is_the_two_equations(sae: StandardSAE):
    x = torch.randn(7, 3, 16)
    x_hat, f = sae.run(x)
    W_enc, b_enc = sae.W_enc.detach().double().numpy(), sae.b_enc.detach().double().numpy()
    W_dec, b_dec = sae.W_dec.detach().double().numpy(), sae.b_dec.detach().double().numpy()
    f_reference = np.maximum((x.double().numpy() - b_dec) @ W_enc + b_enc, 0)
    # float32 products of 16 and 64 terms of order 1
    np.testing.assert_allclose(f.detach().numpy(), f_reference, atol=1e-5)
    np.testing.assert_allclose(x_hat.detach().numpy(), f_reference @ W_dec + b_dec, atol=1e-5)


def test_initial_values():
    torch.manual_seed(3)
    sae = StandardSAE(64, 512)
    assert sae.W_enc.shape == (64, 512) and sae.W_dec.shape == (512, 64)
    assert not sae.b_enc.any() and not sae.b_dec.any()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(512))
    # Xavier normal: variance 2 / (fan_in + fan_out); 32,768 draws give it to about 0.8 %
    assert sae.W_enc.var().item() == pytest.approx(2 / (64 + 512), rel=0.04)


def test_renormalisation_keeps_directions_and_zero_rows(sae: StandardSAE):
    with torch.no_grad():
        sae.W_dec.mul_(3.0)
        sae.W_dec[0] = 0.0
    before = sae.W_dec.detach().clone()
    sae.renormalize_decoder()
    torch.testing.assert_close(sae.W_dec[1:].norm(dim=1), torch.ones(63))
    torch.testing.assert_close(sae.W_dec[1:] * 3.0, before[1:])
    assert not sae.W_dec[0].any()


def test_loss_is_means_over_all_elements():
    x, x_hat = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [3.0, 3.0]])
    f = torch.tensor([[1.0, 0.0, 3.0], [0.0, 2.0, 0.0]])
    assert SAEloss(x_hat, x, f, 0.5).item() == pytest.approx(5 / 4 + 0.5)
    assert SAEloss(x_hat, x, f).item() == pytest.approx(5 / 4 + 1e-3)


@settings(max_examples=20, deadline=None)
@given(d_in=st.integers(1, 9), d_sae=st.integers(1, 40))
def test_any_width_survives_both_layouts(tmp_path_factory: pytest.TempPathFactory, d_in: int, d_sae: int):
    folder = tmp_path_factory.mktemp("sae")
    sae = StandardSAE(d_in, d_sae)
    sae.metadata = {"hook_name": "blocks.3.hook_resid_post", "processing": "raw", "prepend_bos": True}
    save_checkpoint(sae, folder / "checkpoint.pt")
    sae.save_model(folder / "sae")
    for place in (folder / "checkpoint.pt", folder / "sae", folder):
        opened = load_sae(place)
        assert (opened.d_in, opened.d_sae, opened.metadata) == (d_in, d_sae, sae.metadata)
        for name, tensor in sae.named_parameters():
            assert torch.equal(getattr(opened, name), tensor)


def test_checkpoint_is_the_old_state_dict(sae: StandardSAE, tmp_path: Path):
    save_checkpoint(sae, tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert set(loaded) == {"b_pre", "b_enc", "W_enc", "W_dec"}
    again = SparseAutoEncoder(16, 64)
    again.load_state_dict(loaded)  # as old code does it
    assert torch.equal(again.b_pre, sae.b_dec) and torch.equal(again.W_dec, sae.W_dec)
    save_checkpoint(sae, tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_legacy_checkpoint_is_taken_as_the_original_setting(tmp_path: Path):
    tensors = write_legacy(tmp_path / "sae_model_5x.pt", 6, 31)  # not a multiple of d_in
    with pytest.warns(UserWarning, match="centred residual, BOS prepended"):
        sae = load_sae(tmp_path / "sae_model_5x.pt")
    assert (sae.d_in, sae.d_sae) == (6, 31)
    assert sae.metadata == {"processing": "centred", "prepend_bos": True, "legacy": True}
    assert torch.equal(sae.b_dec, tensors["b_pre"])


@pytest.mark.filterwarnings("ignore:.*original pipeline")
def test_asked_for_sizes_must_fit(tmp_path: Path):
    write_legacy(tmp_path / "a.pt", 6, 24)
    assert load_sae_checkpoint(tmp_path / "a.pt", 6, 4).d_sae == 24
    with pytest.raises(MechintError, match="d_in 6, but activation_dim 512"):
        load_sae_checkpoint(tmp_path / "a.pt", 512)
    with pytest.raises(MechintError, match="24 latents for d_in 6, but expansion 8"):
        load_sae_checkpoint(tmp_path / "a.pt", 6, 8)


# --- the class for old code -------------------------------------------------------------------------------------------


def test_a_plain_checkpoint_opens_for_old_code_and_others_as_they_are(tmp_path: Path):
    for architecture, kind in (("standard", SparseAutoEncoder), ("jumprelu", None)):
        sae = build_sae(architecture, 6, 24)
        sae.metadata = {"hook_name": "blocks.3.hook_resid_post", "processing": "raw", "prepend_bos": True}
        save_checkpoint(sae, tmp_path / architecture / "checkpoint.pt")
        sae.save_model(tmp_path / architecture / "sae")
        opened = load_sae_checkpoint(tmp_path / architecture / "checkpoint.pt", 6)
        assert type(opened) is (kind or type(sae)) and opened.metadata == sae.metadata
        x = torch.randn(5, 6)
        for found, expected in zip(opened.run(x), sae.run(x), strict=True):
            assert torch.equal(found, expected)
        if kind is not None:
            x_hat, f = opened.run(x)
            assert torch.equal(f, sae.encode(x)) and torch.equal(x_hat, sae.decode(f))


def test_old_class_starts_as_the_original_did():
    """Xavier-normal both, W_enc first, independent; then rows of unit norm; biases 0. The same numbers from a seed."""
    torch.manual_seed(11)
    sae = SparseAutoEncoder(4, 12)
    torch.manual_seed(11)
    W_enc, W_dec = (torch.nn.init.xavier_normal_(torch.empty(*shape)) for shape in ((4, 12), (12, 4)))
    assert torch.equal(sae.W_enc, W_enc)
    torch.testing.assert_close(sae.W_dec.detach(), W_dec / W_dec.norm(dim=1, keepdim=True))
    assert not sae.b_pre.any() and not sae.b_enc.any() and sae.b_pre.shape == (4,) and sae.b_enc.shape == (12,)


def test_old_class_and_its_state_dict():
    sae = SparseAutoEncoder(m=12, d=4)
    with torch.no_grad():
        sae.b_pre.normal_()
        sae.b_enc.normal_()
    x = torch.randn(7, 4)
    x_hat, f = sae.run(x)
    assert torch.equal(sae.encoder(x), f) and torch.equal(sae.decoder(f), x_hat)
    torch.testing.assert_close(f, torch.relu((x - sae.b_pre) @ sae.W_enc + sae.b_enc))
    state = sae.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes == {"b_pre": (4,), "b_enc": (12,), "W_enc": (4, 12), "W_dec": (12, 4)}
    again = SparseAutoEncoder(4, 12)
    assert again.load_state_dict(state).missing_keys == []
    assert all(torch.equal(getattr(again, name), value) for name, value in state.items())
    around = torch.nn.Sequential(sae)
    assert set(around.state_dict()) == {f"0.{name}" for name in state}
    around.load_state_dict(around.state_dict())


@pytest.mark.parametrize(
    ("args", "kwargs", "said", "instead"),
    [
        ((512, 8), {}, "(512, 8) would have 8 latents", "SparseAutoEncoder(512, 4096)"),
        ((512, 64), {}, "not an expansion", "SparseAutoEncoder(512, 32768)"),
        ((64, 2), {}, "or SparseAutoEncoder(64, m=2)", "SparseAutoEncoder(64, 128)"),
        ((768, 10), {}, "not an expansion", "SparseAutoEncoder(768, 7680)"),
        ((), {"activation_dim": 512, "expansion": 8}, "activation_dim=512", "SparseAutoEncoder(512, 4096)"),
        ((512,), {"expansion": 4}, "(512, expansion=4)", "SparseAutoEncoder(512, 2048)"),
        ((512,), {}, "(512)", "SparseAutoEncoder(512, 4096)"),
        ((512,), {"d_sae": 1000}, "(512, d_sae=1000)", "SparseAutoEncoder(512, 1000)"),
        ((), {"d_in": 512, "d_sae": 1000}, "d_in=512", "SparseAutoEncoder(512, 1000)"),
        ((4, 12), {"saturation": 1.0}, "saturation=1.0", "settings beside them are those of mechint.sae.StandardSAE"),
        ((4, 12, 3), {}, "(4, 12, 3)", "SparseAutoEncoder(4, 12)"),
        ((), {}, "not ()", "SparseAutoEncoder(d, m)"),
    ],
)  # fmt: skip
def test_calls_of_the_other_convention_are_refused(args: tuple, kwargs: dict, said: str, instead: str):
    with pytest.raises(MechintError) as caught:
        SparseAutoEncoder(*args, **kwargs)
    assert said in str(caught.value) and instead in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "kwargs", "d_sae"),
    [
        ((), {"d": 4, "m": 12}, 12),
        ((512, 4096), {}, 4096),
        ((512,), {"m": 8}, 8),  # said by name, so few are meant
        ((16, 4), {}, 4),
        ((32, 8), {}, 8),
        ((512, 100), {}, 100),
        ((128, 32), {}, 32),
        ((64, 64), {}, 64),
        ((3, 1), {}, 1),
    ],
)
def test_calls_of_the_original_are_taken(args: tuple, kwargs: dict, d_sae: int):
    assert SparseAutoEncoder(*args, **kwargs).d_sae == d_sae


class Trap:
    """Unpickling this would create a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_code_in_a_pickle_is_never_run(tmp_path: Path):
    target = tmp_path / "executed"
    torch.save({"W_enc": Trap(target)}, tmp_path / "torch.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap(target)))
    for name in ("torch.pt", "plain.pt"):
        with pytest.raises(MechintError, match="not executed"):
            load_sae(tmp_path / name)
    assert not target.exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert target.exists(), "the trap itself must work, or the test shows nothing"


def test_what_is_not_an_sae_is_refused(sae: StandardSAE, tmp_path: Path):
    save_checkpoint(sae, tmp_path / "good.pt")
    good = torch.load(tmp_path / "good.pt", weights_only=True)
    data = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.pt").touch()
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save({**good, "b_enc": torch.zeros(5)}, tmp_path / "shape.pt")
    torch.save({**good, "W_enc": good["W_enc"] * float("nan")}, tmp_path / "nan.pt")
    (tmp_path / "folder").mkdir()
    expected = {
        "cut.pt": "truncated",
        "empty.pt": "truncated|not a checkpoint",
        "tensor.pt": "not the state dict",
        "other.pt": "expected W_enc, b_enc, W_dec",
        "shape.pt": r"b_enc has shape \[5\], expected \[64\]",
        "nan.pt": "not finite",
        "folder": "none of the formats",
        "absent.pt": "no SAE at",
    }
    for name, message in expected.items():
        with pytest.raises(MechintError, match=message) as caught:
            load_sae(tmp_path / name)
        assert "\n" not in str(caught.value)
