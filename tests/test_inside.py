"""An SAE in its model: every hook, heads, transcoders, and what does not belong together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import HOOK, make_tiny_neox

from mechint import ablation
from mechint.ablation import rank_latents
from mechint.analysis.search import fires_on
from mechint.errors import MechintError
from mechint.eval import evaluate_texts, texts_from_tokens
from mechint.inside import Inside, check_fit, open_inside, put_inside, written_hook
from mechint.models import LanguageModel, load_model
from mechint.sae import SAE, SparseAutoEncoder, save_sae_folder
from mechint.steering import ablate_latent, clamp_latent, steer

TEXTS = ["Anna lives in Paris.", "The small dog has a red ball."]
HEADS = "blocks.3.attn.hook_z"


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return load_model("builtin/pythia-tiny", device="cpu", backend="bridge")


def make_sae(d_in: int, seed: int = 0, d_out: int | None = None, **metadata: object) -> SAE:
    """A small SAE most of whose latents fire, of which little is lost when it is read."""
    torch.manual_seed(seed)
    sae = SparseAutoEncoder(d_in, d_sae=12)
    with torch.no_grad():
        sae.b_enc.fill_(0.5)
        if d_out is not None:
            sae.W_dec = torch.nn.Parameter(torch.randn(12, d_out))
    sae.metadata = dict(metadata)
    return sae.requires_grad_(False)


def at(sae: SAE, model: LanguageModel, hook_name: str) -> Inside:
    return Inside(sae, model, hook_name, Path("x"), None, True, True, None)


def accepted_hooks(model: LanguageModel) -> dict[str, str]:
    """Each hook point of the model by one of its names, and why collect refuses it ("": it does not)."""
    points: dict[int, str] = {}
    for name, point in model.bridge.hook_dict.items():
        points.setdefault(id(point), name)
    found = {}
    for name in points.values():
        try:
            model.hook_shape(name)
            found[name] = ""
        except MechintError as error:
            found[name] = str(error)
    return found


@pytest.mark.parametrize("layers", ["4", pytest.param("01235", marks=pytest.mark.slow)])
def test_at_every_hook_that_collect_accepts_every_reader_works(tiny: LanguageModel, layers: str):
    verdicts = accepted_hooks(tiny)
    names = [name for name, why in verdicts.items() if not why]
    # by reason: not on the way, no vector a token, only looked at
    assert "no pass" in verdicts["blocks.3.attn.hook_result"] and "not use" in verdicts["rotary_emb.hook_in"]
    assert "not one vector" in verdicts["blocks.3.attn.hook_pattern"]
    for part in ("hook_in", "hook_attn_out", "mlp.hook_post", *(f"attn.hook_{x}" for x in "qkvz")):
        assert all(f"blocks.{layer}.{part}" in names for layer in range(tiny.n_layers)), part
    token_lists = tiny.tokenize(TEXTS, prepend_bos=True)
    texts = texts_from_tokens(token_lists, prepend_bos=True, keep_bos=True)
    clean = tiny.logits(torch.tensor(token_lists[:1]))
    for name in names:
        if name.startswith("blocks.") and name.split(".")[1] not in layers:
            continue
        sae = make_sae(tiny.hook_width(name))
        check_fit(sae, tiny, name)
        found = evaluate_texts(at(sae, tiny, name), texts, n_resamples=0)
        assert found["ce_sae"] != found["ce_clean"], name
        # no prediction is left where a LayerNorm divides by 0
        assert found["kl_clean_zero"] is None if name.endswith("hook_scale") else found["kl_clean_zero"] > 0, name
        firing = fires_on(at(sae, tiny, name), TEXTS[0])
        assert len(firing.tokens) == len(token_lists[0]), name
        rows, _ = rank_latents(sae, tiny, name, texts, top=2, control=0, draws=1, exact_texts=1)
        strongest = rows[0]["feature_idx"]
        removed = ablation.compute_text_kl(sae, tiny, name, TEXTS[0], strongest)
        edit = ablate_latent(sae, strongest)
        log_probs = [
            logits.log_softmax(-1) for logits in (clean, tiny.logits_with(torch.tensor(token_lists[:1]), name, edit))
        ]
        kl = (log_probs[0].exp() * (log_probs[0] - log_probs[1])).sum(-1)[0]
        assert removed["kl"] == pytest.approx(kl.tolist(), abs=2e-5), name
        (steered,) = steer(tiny, TEXTS[:1], name, {"clamp": clamp_latent(sae, 1, 3.0)}, max_new_tokens=2)
        assert steered[1].next_kl >= 0 and len(steered) == 2, name
