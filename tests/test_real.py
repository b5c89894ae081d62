"""A small part of `make real`: two real language models, real texts, every step, and rows equal to transformers' own.

Skipped where the material is not there (`python tests/real_material.py` fetches it) unless MECHINT_REQUIRE_REAL is set,
as CI does.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from real_material import CannotFetch, Real, fetch, is_there

from mechint.data import open_activations
from mechint.models import load_model
from mechint.models.pieces import decoder, token_strings

pytestmark = pytest.mark.slow
N_TEXTS = 24
MODELS = {"smollm2": ("blocks.9.hook_resid_post", "blocks.14.hook_resid_post"), "gemma3": ("blocks.9.hook_resid_post",)}


@pytest.fixture(scope="session")
def real() -> Real:
    if not is_there() and not os.environ.get("MECHINT_REQUIRE_REAL"):
        pytest.skip("the real models and texts are not in build/real: python tests/real_material.py fetches them")
    try:
        return fetch()
    except CannotFetch as error:
        if os.environ.get("MECHINT_REQUIRE_REAL"):
            raise
        pytest.skip(str(error))


def mechint(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mechint", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="session", params=MODELS)
def collected(request: pytest.FixtureRequest, real: Real, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`(name of the model, its file, folder of stores, what was said)`."""
    model: Path = getattr(real, request.param)
    output = tmp_path_factory.mktemp("real") / "acts"
    said = mechint(
        *(
            "collect",
            "--model",
            model,
            "--hook",
            *MODELS[request.param],
            "--dataset",
            real.texts / "161_agnews_0.csv.zst",
        ),
        *("--text-field", "prompt", "--num-texts", N_TEXTS),
        *("--output", output, "--device", "cpu"),
    )
    return request.param, model, output, said


def stores(name: str, output: Path) -> dict[str, Path]:
    hooks = MODELS[name]
    return {hook: output / hook if len(hooks) > 1 else output for hook in hooks}


def test_rows_are_those_of_transformers(collected: Any):
    name, model, output, _ = collected
    from transformers import AutoModelForCausalLM

    # In float64: two ways to float32 may lie on two sides of it, by an amount that depends on the processor.
    reference = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32).double()
    for hook, path in stores(name, output).items():
        activations = open_activations(path)
        assert activations.tokens is not None and activations.text_ids is not None
        assert activations.n_rows > 1500 and activations.text_ids.unique().numel() == N_TEXTS
        layer = int(hook.split(".")[1])
        for text in (0, 7, N_TEXTS - 1):
            mine = (activations.text_ids == text).nonzero().flatten()
            ids = activations.tokens[mine].tolist()
            if activations.info["prepend_bos"]:
                ids = [activations.info["bos_token_id"], *ids]
            with torch.inference_mode():
                # the last one of hidden_states is behind the final norm; these layers are not the last
                hidden = reference(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
            expected, rows = hidden[len(ids) - len(mine) :], activations.rows(mine)
            apart = (rows - expected).norm(dim=1) / expected.norm(dim=1)
            assert float(apart.max()) < 1e-5


def test_tokens_are_shown_with_their_spaces(collected: Any, real: Real):
    name, _, output, _ = collected
    activations = open_activations(next(iter(stores(name, output).values())))
    assert activations.tokens is not None and activations.text_ids is not None
    tokenizer = load_model(str(getattr(real, name)), device="cpu").tokenizer
    ids = activations.tokens[activations.text_ids == 3].tolist()
    shown = "".join(token_strings(decoder(tokenizer), ids))
    assert shown.strip() == tokenizer.decode(ids).strip() and shown.count(" ") > 10


@pytest.mark.parametrize("collected", ["smollm2"], indirect=True)
def test_every_step_of_the_pipeline(collected: Any, tmp_path: Path):
    _, _, output, _ = collected
    acts = output / "blocks.14.hook_resid_post"
    mechint(
        *("train", "--preset", "mechint", "--architecture", "topk", "--k", 32, "--expansion", 2, "--steps", 150),
        *("--batch-size", 512, "--val-fraction", 0.25, "--activations-path", acts),
        *("--runs-root", tmp_path, "--run-name", "run"),
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["left_out"]["multiple"] == 10 and summary["fvu"] < 0.9  # 1 is what the mean alone reaches
    mechint("eval", tmp_path / "run", "--max-eval-texts", 3, "--resamples", 50)
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    # news is predicted far better than at random (ln 49,152 = 10.8), worse with the SAE, and worst with the mean
    assert 2 < found["ce_clean"] < 7 and found["ce_clean"] < found["ce_sae"] < found["ce_mean"]
    mechint(*("rank", tmp_path / "run", "--num-texts", 3, "--exact-texts", 2, "--top", 3, "--control", 3, "--draws", 2))
    assert (tmp_path / "run" / "ranking.csv").is_file()
    mechint("report", tmp_path / "run")
    assert (tmp_path / "run" / "report.html").stat().st_size > 100_000
