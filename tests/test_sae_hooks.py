"""An SAE's own hook points, and the names of SAELens's class that it does not have."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mechint import SAE, SAEConfig
from mechint.errors import MechintError
from mechint.sae import ARCHITECTURES, build_sae
from mechint.sae.elsewhere import ELSEWHERE

D_IN, D_SAE = 8, 24
POINTS = ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_error"]
POINTS += ["hook_sae_output"]
ROOT = Path(__file__).resolve().parent.parent


def make(architecture: str = "standard") -> SAE:
    generator = torch.Generator().manual_seed(1)
    options = {"k": 5} if "k" in ARCHITECTURES[architecture].options else {}
    sae = build_sae(architecture, D_IN, D_SAE, options=options, generator=generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return sae


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, D_IN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_cache_holds_every_stage(architecture: str, x: Tensor):
    sae = make(architecture)
    out, cache = sae.run_with_cache(x)
    assert list(sae.hook_dict) == POINTS and [point.name for point in sae.hook_points()] == POINTS
    assert set(cache) == set(POINTS) - {"hook_sae_error"}
    x_hat, feature_acts = sae.run(x)
    expected = {"hook_sae_input": x, "hook_sae_acts_post": feature_acts, "hook_sae_recons": x_hat}
    for name, value in {**expected, "hook_sae_output": out}.items():
        assert torch.equal(cache[name], value), name
    assert torch.equal(out, x_hat) and cache["hook_sae_acts_pre"].shape == (2, 3, D_SAE)
    _, some = sae.run_with_cache(x, names_filter=["hook_sae_acts_post"], remove_batch_dim=True)
    assert list(some) == ["hook_sae_acts_post"] and some["hook_sae_acts_post"].shape == (3, D_SAE)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_functions_change_what_comes_after_and_are_gone_afterwards(architecture: str, x: Tensor):
    sae = make(architecture)
    before = sae(x)

    def silence(value: Tensor, hook: Any) -> Tensor:
        assert hook.name == "hook_sae_acts_post"
        return torch.zeros_like(value)

    silenced = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", silence)])
    torch.testing.assert_close(silenced, sae.b_dec.expand_as(silenced))
    assert torch.equal(sae(x), before)
    with sae.hooks(fwd_hooks=[(lambda name: name.endswith("output"), lambda value, hook: value + 1)]):
        assert torch.equal(sae(x), before + 1)
    assert torch.equal(sae(x), before)
    with pytest.raises(MechintError, match="hook_sae_acts_pots.*nearest: hook_sae_acts_post"):
        sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_pots", silence)])


def test_attached_functions_stay_until_reset(x: Tensor):
    sae, seen = make(), []
    sae.add_hook("hook_sae_input", lambda value, hook: seen.append("usual"))
    sae.add_hook("hook_sae_input", lambda value, hook: seen.append("permanent"), is_permanent=True)
    sae(x)
    sae.reset_hooks()
    sae(x)
    assert seen == ["usual", "permanent", "permanent"]
    sae.reset_hooks(including_permanent=True)
    sae(x)
    assert len(seen) == 3


def test_gradients_reach_hooks_and_cache(x: Tensor):
    sae, found = make(), {}
    sae.add_hook("hook_sae_acts_post", lambda gradient, hook: found.update(given=gradient), dir="bwd")
    out, cache = sae.run_with_cache(x, names_filter="hook_sae_acts_post")
    out.sum().backward()
    expected = sae.W_dec.sum(dim=1).expand(2, 3, D_SAE)
    torch.testing.assert_close(found["given"], expected)
    assert not cache["hook_sae_acts_post"].requires_grad


def test_the_error_term_gives_the_input_back_unless_something_is_changed(x: Tensor):
    sae = make()
    sae.use_error_term = True
    torch.testing.assert_close(sae(x), x)
    _, cache = sae.run_with_cache(x)
    torch.testing.assert_close(cache["hook_sae_error"], x - sae.run(x)[0])
    changed = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda value, hook: value * 0)])
    torch.testing.assert_close(changed, x - sae.run(x)[0] + sae.b_dec)  # the error is that of the clean pass


def test_heads_side_by_side_are_switched():
    sae, heads = make(), torch.randn(2, 3, 2, D_IN // 2)
    assert not sae.hook_z_reshaping_mode
    with pytest.raises(MechintError, match="hook_z; this one is of None"):
        sae.turn_on_forward_pass_hook_z_reshaping()
    sae.metadata = {"hook_name": "blocks.0.attn.hook_z"}
    assert sae.hook_z_reshaping_mode and sae(heads).shape == heads.shape
    assert torch.equal(sae.encode(heads), sae.encode(heads.flatten(-2)))
    sae.turn_off_forward_pass_hook_z_reshaping()
    with pytest.raises(MechintError, match="width 4"):
        sae(heads)
    sae.turn_on_forward_pass_hook_z_reshaping()
    assert sae(heads).shape == heads.shape


def test_process_sae_in_is_what_the_encoder_multiplies(x: Tensor):
    for settings in ({}, {"apply_b_dec_to_input": False, "input_scale": 3.0}, {"normalize_activations": "layer_norm"}):
        sae = make().variant(**settings)
        by_hand = (sae.process_sae_in(x) @ sae.W_enc + sae.b_enc).relu()
        assert torch.equal(by_hand, sae.encode(x)), settings
    assert torch.equal(make().process_sae_in(x), x - make().b_dec)


def test_an_sae_with_hooks_is_trained_and_copied_as_one_without(x: Tensor):
    import copy

    sae = make()
    sae.add_hook("hook_sae_acts_post", lambda value, hook: None)
    assert torch.equal(copy.deepcopy(sae)(x), sae(x)) and not any("hook" in name for name in sae.state_dict())
    assert [name for name, _ in sae.named_parameters()] == ["W_enc", "b_enc", "W_dec", "b_dec"]


def test_what_is_missing_says_what_does_the_same():
    sae = SAE(SAEConfig(4, 8))
    for name, instead in ELSEWHERE.items():
        assert not hasattr(sae, name), f"{name} is there: take it off the list"
        with pytest.raises(AttributeError, match="SAELens") as error:
            getattr(sae, name)
        assert isinstance(error.value, MechintError) and instead in str(error.value)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sae.no_such_name
    text = (ROOT / "docs" / "saelens.md").read_text(encoding="utf-8")
    for name, instead in ELSEWHERE.items():
        assert f"| `{name}` | {instead} |" in text, f"docs/saelens.md does not say where {name} is"
