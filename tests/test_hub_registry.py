"""Registries of SAEs and steering vectors, and what is loaded from this machine."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from published import (
    D_IN,
    D_SAE,
    HOOK,
    K,
    a_direction,
    platform_tensors,
)
from safetensors.torch import save_file

from mechint.cli import apply_steering, list_saes, list_steering
from mechint.errors import MechintError
from mechint.hub.steering_loading import load_steering_vector
from mechint.huggingface import registry as registries
from mechint.huggingface.registry import (
    SAE_REGISTRY,
    STEERING_REGISTRY,
    SAEDescriptor,
    SteeringVectorDescriptor,
    sae_registry,
    steering_registry,
)
from mechint.sae.load import load_pretrained_sae
from mechint.steering import save_direction

# --- registries -------------------------------------------------------------------------------------------------------


def test_what_comes_with_the_package_and_its_descriptors():
    assert {"neelnanda-gpt2-small-res-jb-l6", "neelnanda-gpt2-small-res-jb-l8"} == set(SAE_REGISTRY)
    eight = SAE_REGISTRY["neelnanda-gpt2-small-res-jb-l8"]
    assert eight.hf_repo == "jbloom/GPT2-Small-SAEs-Reformatted"
    assert eight.weights_file == "blocks.8.hook_resid_pre/sae_weights.safetensors"
    assert (eight.config["n_features"], eight.config["input_dim"], eight.config["k"]) == (24576, 768, None)
    norms = {name: vector.direction_norm for name, vector in STEERING_REGISTRY.items()}
    assert norms == {
        "refusal-qwen-2.5-1.5b-l10": 11.73,
        "sentiment-gpt2-medium-l8": 15.36,
        "helpfulness-qwen-2.5-0.5b-l8": 5.54,
    }
    refusal = STEERING_REGISTRY["refusal-qwen-2.5-1.5b-l10"]
    assert (refusal.hook_site, refusal.source_run_id) == ("blocks.10.hook_resid_post", 70)
    for descriptor in (eight, refusal):
        with pytest.raises(dataclasses.FrozenInstanceError):
            descriptor.license = "MIT"  # pyright: ignore


def test_a_list_needs_no_torch(tmp_path: Path):
    heavy = "{'torch', 'huggingface_hub'} & set(sys.modules)"
    code = f"import sys; from mechint.cli.list_saes import main; main([]); print(sorted({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "neelnanda-gpt2-small-res-jb-l6" in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_of_one_name_the_nearest_entry_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(path: Path, *names: str) -> Path:
        vectors = {
            name: {"model_name": path.stem, "hook_site": HOOK, "direction_norm": 1, "hf_repo": "a/b"} for name in names
        }
        path.write_text(json.dumps({"steering_vectors": vectors}))
        return path

    def who() -> dict[str, str]:
        found = steering_registry(tmp_path / "passed.json")
        return {name: vector.model_name for name, vector in found.items() if name in "abcde"}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registries, "STEERING_REGISTRY", dict(STEERING_REGISTRY))
    shipped = "sentiment-gpt2-medium-l8"
    write(tmp_path / "passed.json", "a")
    first, second = write(tmp_path / "first.json", "a", "b", "c"), write(tmp_path / "second.json", "a", "b", "c", "d")
    monkeypatch.setenv("MECHINT_REGISTRY", f"{first}{os.pathsep}{second}")
    write(tmp_path / "mechint-registry.json", "a", "b", "c", "d", "e", shipped)
    registries.STEERING_REGISTRY["b"] = SteeringVectorDescriptor("b", "python", HOOK, 1.0, "", "MIT")
    assert who() == {"a": "passed", "b": "python", "c": "first", "d": "second", "e": "mechint-registry"}
    assert steering_registry()[shipped].model_name == "mechint-registry"
    monkeypatch.chdir(tmp_path.parent)
    assert steering_registry()[shipped].model_name == "gpt2-medium"
    assert "e" not in steering_registry()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ('{"vectors": {}}', "unknown key 'vectors'; valid: saes, steering_vectors"),
        ('{"saes": []}', "saes should be an object"),
        ('{"saes": {"x": 3}}', "x should be an object, found 3"),
        ('{"saes": {"x": {"hf_rep": "a/b"}}}', "unknown key 'hf_rep'; nearest: hf_repo"),
        ('{"saes": {"x": {"license": "MIT"}}}', "missing hf_repo or local_path"),
        ('{"saes": {"x": {"hf_repo": 3}}}', "hf_repo should be a string or null, found 3"),
        ('{"saes": {"x": {"hf_repo": "a/b", "config": "k=3"}}}', "config should be an object"),
        ('{"steering_vectors": {"x": {"hf_repo": "a/b"}}}', "missing model_name, hook_site"),
        (
            '{"steering_vectors": {"x": {"direction_norm": "2"}}}',
            'direction_norm should be a number or null, found "2"',
        ),
    ],
)
def test_a_broken_registry_file_is_told(tmp_path: Path, content: str, words: str):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(MechintError, match="(?s)mine.json") as told:
        sae_registry(path)
    assert words in str(told.value)
    with pytest.raises(MechintError, match="not found"):
        steering_registry(tmp_path / "none.json")


def test_lists_say_where_each_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    save_direction(a_direction(), tmp_path / "steering" / "sentiment-gpt2-medium-l8")
    vector = {"model_name": "a\x1b[31mb", "hook_site": HOOK, "hf_repo": "lab/v", "hf_revision": "v1", "license": "MIT"}
    (tmp_path / "mechint-registry.json").write_text(json.dumps({"steering_vectors": {"mine": vector}}))
    assert list_steering.main([]) == 0
    shown = capsys.readouterr().out.splitlines()
    heads = [cell.strip() for cell in shown[2].split("┃")[1:-1]]
    assert heads == ["Name", "Model", "Hook site", "Raw norm", "License", "Source"]
    lines = {line.split("│")[1].strip(): line for line in shown if "│" in line}
    assert "a\\x1b[31mb" in lines["mine"], "a registry's text reached the terminal's cursor"
    assert "Hub: lab/v at v1" in lines["mine"]
    assert "15.36" in lines["sentiment-gpt2-medium-l8"] and "research-only" in lines["sentiment-gpt2-medium-l8"]
    assert "steering/sentiment-gpt2-medium-l8" in lines["sentiment-gpt2-medium-l8"]
    assert "not here" not in lines["sentiment-gpt2-medium-l8"]
    assert "not here" in lines["refusal-qwen-2.5-1.5b-l10"]
    assert list_saes.main([]) == 0
    assert "24576 x 768" in capsys.readouterr().out
    assert list_saes.main(["--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(SAE_REGISTRY)


# --- from this machine ------------------------------------------------------------------------------------------------


def test_a_local_vector_and_what_its_sidecar_may_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    sidecar = {"license": "MIT", "kind": "sae", "extraction_quality": 2.5, "model": "another"}
    save_direction(a_direction(**sidecar), tmp_path / "base" / "steering" / "sentiment-gpt2-medium-l8")
    vector, said = load_steering_vector("sentiment-gpt2-medium-l8", base_dir=tmp_path / "base")
    assert vector.dtype == torch.float32 and vector.ndim == 1 and abs(float(vector.norm()) - 1) < 1e-6
    stated = {"name": "sentiment-gpt2-medium-l8", "license": "research-only", "kind": "steering"}
    assert {key: said[key] for key in stated} == stated
    assert (said["model_name"], said["extraction_quality"]) == ("gpt2-medium", 2.5)
    assert abs(said["direction_norm"] - 12) < 1e-3  # measured, where the registry has two digits
    assert said["local_path"].endswith("sentiment-gpt2-medium-l8/direction.safetensors") and said["hf_repo"] is None
    by_path, _ = load_steering_vector("base/steering/sentiment-gpt2-medium-l8")
    assert torch.equal(vector, by_path)
    with pytest.raises(MechintError, match="extract-steering --model gpt2-medium --hook blocks.8.hook_resid_pre"):
        load_steering_vector("sentiment-gpt2-medium-l8")
    with pytest.raises(MechintError, match="unknown steering vector 'sentimnt.*nearest: sentiment-gpt2-medium-l8"):
        load_steering_vector("sentimnt-gpt2-medium-l8")
    with pytest.raises(MechintError, match="unknown steering vector '../x/y'"):
        load_steering_vector("../x/y")


def test_a_local_vector_that_is_none_is_refused(tmp_path: Path):
    mine = {"model_name": "m", "hook_site": HOOK, "local_path": "v"}  # counts from the registry's own folder
    (tmp_path / "mine.json").write_text(json.dumps({"steering_vectors": {"mine": mine}}))

    def told() -> str:
        with pytest.raises(MechintError) as error:
            load_steering_vector("mine", registry=tmp_path / "mine.json")
        return str(error.value)

    (tmp_path / "v").mkdir()
    file = tmp_path / "v" / "direction.safetensors"
    save_file({"vector": torch.ones(4) / 2}, file)
    assert "no key 'direction'; it has vector" in told()
    save_file({"direction": torch.ones(4)}, file)
    assert "norm 2, expected 1" in told()
    save_file({"direction": torch.ones(4) / 2}, file)
    vector, said = load_steering_vector("mine", registry=tmp_path / "mine.json")
    assert vector.tolist() == [0.5] * 4 and said["direction_norm"] is None
    file.with_name(f"{file.name}.json").write_text(json.dumps({"hook_site": "blocks.9.hook_resid_post"}))
    assert f"{HOOK} is stated for it, but its sidecar says blocks.9.hook_resid_post" in told()


def test_a_local_sae_whose_settings_only_the_registry_knows(tmp_path: Path):
    theirs = platform_tensors()
    (tmp_path / "a").mkdir()
    save_file(theirs, tmp_path / "a" / "sae_weights.safetensors")
    (tmp_path / "b").mkdir()
    ours = {
        "W_enc": theirs["encoder.weight"].t().contiguous(),
        "b_enc": theirs["encoder.bias"],
        "W_dec": theirs["decoder.weight"].t().contiguous(),
        "b_dec": theirs["decoder.bias"],
    }
    save_file(ours, tmp_path / "b" / "weights.safetensors")
    config = {"n_features": D_SAE, "k": K, "input_dim": D_IN, "hook_site": HOOK, "model_name": "tiny"}
    entries = {
        "linear": {"local_path": "a", "config": config, "license": "MIT"},
        "plain": {"local_path": "b/weights.safetensors", "config": config},
        "subtracted": {"local_path": "b/weights.safetensors", "config": {**config, "apply_b_dec_to_input": True}},
        "relu": {"local_path": "b/weights.safetensors", "config": {**config, "k": None, "apply_b_dec_to_input": False}},
        "wider": {"local_path": "a", "config": {**config, "n_features": D_SAE + 1}},
    }
    (tmp_path / "mine.json").write_text(json.dumps({"saes": entries}))
    x = torch.randn(30, D_IN, generator=torch.Generator().manual_seed(1))
    pre = x @ ours["W_enc"] + ours["b_enc"]

    def codes(name: str) -> torch.Tensor:
        return load_pretrained_sae(name, registry=tmp_path / "mine.json")[0].encode(x).detach()

    def top(values: torch.Tensor) -> torch.Tensor:
        found = values.topk(K)
        return torch.zeros_like(values).scatter(1, found.indices, found.values)

    assert bool((top(pre) < 0).any()), "no negative entry is chosen, so that a ReLU could not be told"
    torch.testing.assert_close(codes("linear"), top(pre))
    torch.testing.assert_close(codes("relu"), pre.relu())
    torch.testing.assert_close(codes("subtracted"), top((x - ours["b_dec"]) @ ours["W_enc"] + ours["b_enc"]).relu())
    with pytest.raises(MechintError, match="needs apply_b_dec_to_input: true or false"):
        codes("plain")
    with pytest.raises(MechintError, match="n_features"):
        codes("wider")
    with pytest.raises(MechintError, match="revision v1 of which repository"):
        load_pretrained_sae("linear", registry=tmp_path / "mine.json", revision="v1")
    with pytest.raises(MechintError, match="try --device cpu"):
        load_pretrained_sae("linear", registry=tmp_path / "mine.json", device="gpu9")
    sae, said = load_pretrained_sae("linear", registry=tmp_path / "mine.json")
    assert (said["hook_site"], said["license"], said["k"], said["revision"]) == (HOOK, "MIT", K, None)
    assert sae.cfg.hook_name == HOOK and sae.cfg.model_name == "tiny"


def test_vectors_are_steered_with_in_units_of_their_raw_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from mechint.config.registry import ApplySteeringConfig
    from mechint.hub.apply import apply_steering as apply

    monkeypatch.chdir(tmp_path)
    place = {"model": "builtin/pythia-tiny", "hook_site": HOOK, "processing": "raw", "mean_activation_norm": 3.0}
    save_direction(a_direction(**place), tmp_path / "v")

    def kl(coefficient: float, unit: Any) -> float:
        given: dict[str, Any] = {"vector": "v", "prompt": ("Omar was",), "max_new_tokens": 2, "device": "cpu"}
        return apply(ApplySteeringConfig(**given, coefficient=(coefficient,), unit=unit)).results[0][1].next_kl

    in_raw = kl(6.0, "raw")
    assert in_raw > 1e-3
    assert kl(0.5, "vector") == pytest.approx(in_raw, rel=1e-3)
    assert kl(2.0, "norm") == pytest.approx(in_raw, rel=1e-3)
    assert kl(-6.0, "raw") != pytest.approx(in_raw, rel=1e-2)
    flags = ["--vector", "v", "--coefficient", "-1", "0.5", "--prompt", "Omar was", "--max-new-tokens", "3"]
    assert apply_steering.main([*flags, "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "12 activation units a coefficient (vector)" in shown
    assert all(word in shown for word in ("prompt: Omar was", "baseline", "add -1", "add 0.5"))
    assert apply_steering.main(["--vector", "nope", "--prompt", "x"]) == 2
    assert "mechint list-steering" in capsys.readouterr().err


def test_a_descriptor_says_which_file_of_which_repository():
    mine = SAEDescriptor("mine", "lab/saes", "layer_3/sae_weights.safetensors", {"k": 3}, "MIT")
    assert (mine.hf_revision, mine.local_path, mine.description) == (None, None, "")
    assert registries.source_in_words(mine) == "Hub: lab/saes"


def test_the_documented_registry_file_is_one(tmp_path: Path):
    page = (Path(__file__).resolve().parent.parent / "docs" / "publish.md").read_text(encoding="utf-8")
    block = page.split("## Registries")[1].split("```json")[1].split("```")[0]
    (tmp_path / "mine.json").write_text(block)
    assert sae_registry(tmp_path / "mine.json")["my-sae"].hf_revision == "v1"
    found = steering_registry(tmp_path / "mine.json")["sentiment-gpt2-medium-l8"]
    assert found.local_path == tmp_path / "steering" / "sentiment-gpt2-medium-l8"
    assert registries.source_in_words(found) == "Hub: myorg/sv-sentiment-gpt2-medium-l8"
