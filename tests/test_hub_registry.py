"""SAEs and steering vectors by name and by repository: registry files, a loopback Hub in fresh processes, the cache."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import other_formats
import pytest
import torch
from loopback_hub import LoopbackHub
from safetensors.torch import save, save_file

from mechint.cli import apply_steering, list_saes, list_steering
from mechint.errors import MechintError
from mechint.formats import FORMATS, reference_encode
from mechint.hub import registry as registries
from mechint.hub.registry import (
    SAE_REGISTRY,
    STEERING_REGISTRY,
    SAEDescriptor,
    SteeringVectorDescriptor,
    sae_registry,
    steering_registry,
)
from mechint.hub.sae_loading import load_pretrained_sae
from mechint.hub.steering_loading import load_steering_vector
from mechint.steering import Direction, make_direction, save_direction

PRELUDE = """
import json, os, sys
import torch
from mechint.errors import MechintError
out = {}

def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except MechintError as told:
        return str(told)
    return "nothing was raised"
"""
HOOK = "blocks.3.hook_resid_post"
D_IN, D_SAE, K = 6, 20, 5
RUN51, VECTOR = "myorg/sae-run51-gpt2-medium", "myorg/sv-sentiment-gpt2-medium-l8"


def run(script: str, env: dict[str, str], cwd: Path) -> dict[str, Any]:
    """Run a script that fills the dict `out` in a fresh process, and return it."""
    code = PRELUDE + textwrap.dedent(script) + "\nprint(json.dumps(out))"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def metadata_of(files: dict[str, bytes], **said: Any) -> bytes:
    """bundle_metadata.json of these files."""
    hashes = {name: {"sha256": hashlib.sha256(value).hexdigest(), "size": len(value)} for name, value in files.items()}
    return json.dumps({**said, "files": hashes}).encode()


def platform_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of the mech platform's TopKSAE, with biases that let negative entries be among the largest."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "encoder.weight": torch.randn(D_SAE, D_IN, generator=draw),
        "encoder.bias": torch.randn(D_SAE, generator=draw) - 3.0,
        "decoder.weight": torch.randn(D_IN, D_SAE, generator=draw),
        "decoder.bias": torch.randn(D_IN, generator=draw),
    }


def platform_bundle(seed: int = 0) -> dict[str, bytes]:
    """What `publish-sae --run-id 51` uploads, small."""
    sidecar = {"dtype": "torch.float32", "input_dim": D_IN, "k": K, "n_features": D_SAE, "training": None}
    files = {
        "sae_weights.safetensors": save(platform_tensors(seed)),
        "sae_weights.safetensors.json": json.dumps(sidecar).encode(),
        "environment.json": b"{}",
        "feature_analysis.json": b"{}",
        "README.md": b"# a card\n",
    }
    spec = {"parameters": {"model": "gpt2-medium", "hook_site": "blocks.8.hook_resid_pre"}}
    return files | {
        "bundle_metadata.json": metadata_of(files, kind="sae", run_id=51, license="research-only", spec=spec)
    }


def a_direction(width: int = 128, **info: Any) -> Direction:
    raw = torch.randn(width, generator=torch.Generator().manual_seed(3))
    said = {"name": "from-the-sidecar", "model": "gpt2-medium", "hook_site": "blocks.8.hook_resid_pre"}
    return make_direction(raw * 12 / raw.norm(), **said | info)


def vector_bundle(folder: Path, **info: Any) -> dict[str, bytes]:
    """What `publish-steering` uploads; the sidecar claims a licence and a kind of its own."""
    claims = {"license": "do-what-you-want", "kind": "sae", "extraction_quality": 1.5} | info
    path = save_direction(a_direction(**claims), folder)
    files = {
        name: (path.parent / name).read_bytes() for name in ("direction.safetensors", "direction.safetensors.json")
    }
    said = {"name": "sentiment-gpt2-medium-l8", "kind": "steering", "license": "research-only"}
    return files | {"bundle_metadata.json": metadata_of(files, **said), "README.md": b"# a card\n"}


@pytest.fixture()
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "server") as server:
        yield server


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


# --- from the Hub -----------------------------------------------------------------------------------------------------

SEED = f"""
    from mech_interp.sae.registry import load_pretrained_sae
    sae, config = load_pretrained_sae("{RUN51}")

    from mech_interp.steering.registry import load_steering_vector
    from mech_interp.steering.registry import STEERING_REGISTRY, SteeringVectorDescriptor
    STEERING_REGISTRY["sentiment-gpt2-medium-l8"] = SteeringVectorDescriptor(
        name="sentiment-gpt2-medium-l8",
        model_name="gpt2-medium",
        hook_site="blocks.8.hook_resid_pre",
        direction_norm=15.36,
        description="Sentiment.",
        license="research-only",
        local_path=None,          # not cloned locally
        hf_repo="{VECTOR}",
    )
    direction, metadata = load_steering_vector("sentiment-gpt2-medium-l8")
    x = torch.randn(30, {D_IN}, generator=torch.Generator().manual_seed(1))
    codes = sae.encode(x)
    out |= {{"config": config, "codes": codes.tolist(), "decoded": sae.decode(codes).tolist(), "metadata": metadata}}
    out |= {{"direction": direction.tolist(), "dtype": str(direction.dtype), "hook": sae.cfg.hook_name}}
"""


@pytest.mark.slow
def test_the_documented_imports_run_unchanged_also_from_the_cache(hub: LoopbackHub, tmp_path: Path):
    commit = hub.add_repo(RUN51, platform_bundle())
    hub.add_repo(VECTOR, vector_bundle(tmp_path / "vector"))
    out = run(SEED, hub.env(tmp_path / "hf"), tmp_path)

    w = platform_tensors()
    x = torch.randn(30, D_IN, generator=torch.Generator().manual_seed(1))
    top = (x @ w["encoder.weight"].t() + w["encoder.bias"]).topk(K)
    codes = torch.zeros(30, D_SAE).scatter(1, top.indices, top.values)
    assert bool((codes < 0).any())
    torch.testing.assert_close(torch.tensor(out["codes"]), codes)
    decoded = codes @ w["decoder.weight"].t() + w["decoder.bias"]
    torch.testing.assert_close(torch.tensor(out["decoded"]), decoded)
    expected = {
        "name": RUN51,
        "hf_repo": RUN51,
        "revision": commit,
        "license": "research-only",
        "source": "pretrained_sae",
        "n_features": D_SAE,
        "k": K,
        "input_dim": D_IN,
        "hook_site": "blocks.8.hook_resid_pre",
        "model_name": "gpt2-medium",
    }
    assert {key: out["config"].get(key) for key in expected} == expected
    assert Path(out["config"]["weights_path"]).is_file() and out["hook"] == "blocks.8.hook_resid_pre"

    torch.testing.assert_close(torch.tensor(out["direction"]), a_direction().vector)
    stated = {"name": "sentiment-gpt2-medium-l8", "license": "research-only", "kind": "steering", "hf_repo": VECTOR}
    assert {key: out["metadata"][key] for key in stated} == stated
    assert out["dtype"] == "torch.float32" and out["metadata"]["extraction_quality"] == 1.5

    # nothing but what is needed was downloaded, and nothing was asked elsewhere
    fetched = {request.path.rsplit("/", 1)[1] for request in hub.seen("HEAD", "/resolve/")}
    names = {"sae_weights.safetensors", "direction.safetensors", "bundle_metadata.json"}
    assert fetched == names | {"sae_weights.safetensors.json", "direction.safetensors.json"}
    assert not hub.seen("OUTSIDE")

    n_downloads = len(hub.seen("GET", "/storage/"))
    assert run(SEED, hub.env(tmp_path / "hf", offline=True), tmp_path) == out
    n_asked = len(hub.seen("GET", "^/api/"))
    hub.fail_next(2, 503, match="GET /api/")
    assert run(SEED, hub.env(tmp_path / "hf"), tmp_path) == out
    assert len(hub.seen("GET", "^/api/")) == n_asked + 2, (
        "with all in the cache a Hub that fails is asked once, no more"
    )
    hub.commit(RUN51, {"README.md": b"# another\n"})
    later = run(SEED, hub.env(tmp_path / "hf"), tmp_path)
    assert later["config"]["revision"] != commit and later["codes"] == out["codes"]
    assert len(hub.seen("GET", "/storage/")) == n_downloads, "what did not change was downloaded again"
    hub.stop()
    assert run(SEED, hub.env(tmp_path / "hf"), tmp_path) == later


@pytest.mark.slow
def test_revisions_are_pinned_and_mistakes_told(hub: LoopbackHub, tmp_path: Path):
    first = hub.add_repo(RUN51, platform_bundle())
    hub.tag(RUN51, "v1")
    hub.commit(RUN51, platform_bundle(seed=1))
    bundle = vector_bundle(tmp_path / "vector")
    hub.add_repo(VECTOR, bundle)
    hub.add_repo(
        "lab/several", {f"layer_{i}/run/{name}": data for i in (3, 8) for name, data in platform_bundle(i).items()}
    )
    hub.commit(
        "lab/several", {"bundle_metadata.json": metadata_of({}, license="MIT", spec={"parameters": {"model": "x"}})}
    )
    hub.add_repo("lab/text", {"README.md": b"# nothing\n"})
    eighth = other_formats.write("saelens_pre6", other_formats.make("standard"), tmp_path / "blocks.8")
    files = {f"blocks.8.hook_resid_pre/{file.name}": file for file in eighth.iterdir()}
    hub.add_repo("jbloom/GPT2-Small-SAEs-Reformatted", files)
    config = {"n_features": D_SAE, "k": K, "input_dim": D_IN}
    pinned = {"hf_repo": RUN51, "hf_revision": "v1", "license": "MIT", "config": config}
    mine = {"saes": {"pinned": pinned, "other": {**pinned, "config": {**config, "k": K + 1}}}}
    (tmp_path / "mechint-registry.json").write_text(json.dumps(mine))
    script = f"""
    from mechint.hub.sae_loading import load_pretrained_sae as sae
    from mechint.hub.steering_loading import load_steering_vector as vector
    def weights(*args, **kwargs):
        found, config = sae(*args, **kwargs)
        return [float(found.W_enc.sum()), config["revision"], config["license"], config["name"]]
    out["newest"], out["tag"] = weights("{RUN51}"), weights("{RUN51}", revision="v1")
    out["commit"], out["pinned"] = weights("{RUN51}", revision="{first}"), weights("pinned")
    out["nested"] = weights("lab/several/layer_8/run")
    out["of all"] = sae("lab/several/layer_8/run")[1]["model_name"]
    out["file"] = weights("lab/several/layer_8/run/sae_weights.safetensors")
    out["cache"] = sae("{RUN51}", cache_dir="elsewhere")[1]["weights_path"]
    out["direction"] = float(vector("{VECTOR}")[0].norm())
    out["errors"] = {{
        "k": error(sae, "other"),
        "revision": error(sae, "{RUN51}", revision="v9"),
        "folder": error(sae, "lab/several"),
        "wrong folder": error(sae, "lab/several/layer_4/run"),
        "nothing": error(sae, "lab/text"),
        "vector": error(sae, "{VECTOR}"),
        "no vector": error(vector, "{RUN51}"),
        "missing": error(sae, "lab/none"),
        "name": error(sae, "pined"),
        "out": error(sae, "lab/several/../x"),
        "shipped": error(sae, "neelnanda-gpt2-small-res-jb-l8"),
    }}
    """
    out = run(script, hub.env(tmp_path / "hf"), tmp_path)
    old, new = (float(platform_tensors(seed)["encoder.weight"].sum()) for seed in (0, 1))
    assert out["newest"][0] == pytest.approx(new, rel=1e-4) and out["newest"][1] != first
    for key in ("tag", "commit", "pinned"):
        assert out[key][:2] == [pytest.approx(old, rel=1e-4), first], key
    assert out["pinned"][2:] == ["MIT", "pinned"] and out["tag"][2:] == ["research-only", RUN51]
    eight = float(platform_tensors(8)["encoder.weight"].sum())
    assert out["nested"][0] == out["file"][0] == pytest.approx(eight, rel=1e-4)
    assert out["nested"][2] == "MIT" and out["of all"] is None
    assert "/elsewhere/models--" in out["cache"] and out["direction"] == pytest.approx(1.0)
    errors = out["errors"]
    assert f"k is {K}" in errors["k"] and f"{K + 1} is stated" in errors["k"]
    assert "no such revision" in errors["revision"]
    assert "lab/several/FOLDER" in errors["folder"] and "layer_3/run, layer_8/run" in errors["folder"]
    assert "holds no SAE at 'layer_4/run'" in errors["wrong folder"] and "nearest: layer_" in errors["wrong folder"]
    assert "holds no SAE at its root, nor anywhere else" in errors["nothing"]
    assert "steering vector: load_steering_vector" in errors["vector"]
    assert "has no direction.safetensors" in errors["no vector"] and "not a steering vector" in errors["no vector"]
    assert "lab/none" in errors["missing"] and "hf auth login" in errors["missing"]
    assert "unknown SAE 'pined'" in errors["name"] and "nearest: pinned" in errors["name"]
    assert "path in it" in errors["out"]
    assert "n_features is 7" in errors["shipped"] and "24576 is stated for it" in errors["shipped"]


@pytest.mark.slow
def test_files_that_are_not_what_was_published_are_refused(hub: LoopbackHub, tmp_path: Path):
    hub.add_repo(RUN51, platform_bundle())
    changed = platform_bundle() | {"sae_weights.safetensors": platform_bundle(1)["sae_weights.safetensors"]}
    hub.add_repo("lab/changed", changed)
    hub.add_repo("lab/odd", platform_bundle() | {"bundle_metadata.json": b'{"files": ["a"]}'})
    strange = {"license": ["MIT"], "spec": {"parameters": {"model": {"a": 1}, "hook_site": 3}}}
    hub.add_repo("lab/strange", platform_bundle() | {"bundle_metadata.json": json.dumps(strange).encode()})
    bundle = vector_bundle(tmp_path / "vector")
    hub.add_repo("lab/vector", bundle | {"direction.safetensors.json": b'{"license": "MIT"}'})
    script = f"""
    from pathlib import Path
    from mechint.hub.sae_loading import load_pretrained_sae, open_pretrained_sae
    from mechint.hub.steering_loading import load_steering_vector
    opened = open_pretrained_sae("{RUN51}")
    out["verified"], file = sorted(opened.verified), Path(opened.config["weights_path"])
    content = file.read_bytes()
    file.resolve().write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # the cache is damaged
    again = open_pretrained_sae("{RUN51}")
    out["mended"] = file.read_bytes() == content and torch.equal(again.sae.W_enc, opened.sae.W_enc)
    out["changed"] = error(load_pretrained_sae, "lab/changed")
    out["odd"] = error(load_pretrained_sae, "lab/odd")
    out["vector"] = error(load_steering_vector, "lab/vector")
    sae, config = load_pretrained_sae("lab/strange")
    out["strange"] = [config["license"], config["model_name"], config["hook_site"]]
    """
    out = run(script, hub.env(tmp_path / "hf"), tmp_path)
    assert out["verified"] == ["sae_weights.safetensors", "sae_weights.safetensors.json"] and out["mended"]
    assert (
        "sae_weights.safetensors of lab/changed" in out["changed"]
        and "changed after it was published" in out["changed"]
    )
    assert "files should hold sha256" in out["odd"] and out["strange"] == ["unknown", None, None]
    assert "direction.safetensors.json of lab/vector" in out["vector"]


@pytest.mark.slow
def test_every_format_is_recognised_after_download(hub: LoopbackHub, tmp_path: Path):
    names = sorted(name for name, form in FORMATS.items() if form.write is not None and form.read is not None)
    assert len(names) >= 9
    folder, expected = tmp_path / "formats", {}
    for name in names:
        (folder / name).mkdir(parents=True)
        path = other_formats.any_file(name, folder / name)
        loaded = other_formats.read(name, path)
        x = torch.randn(8, loaded.d_in, generator=torch.Generator().manual_seed(2))
        where = path.relative_to(folder).as_posix()
        expected[where] = expected[Path(where).parent.as_posix()] = reference_encode(loaded, x).float()
        if path.is_dir():
            del expected[name]  # the SAE lies in the folder below
    hub.add_repo("lab/formats", folder)
    script = f"""
    from mechint.hub.sae_loading import load_pretrained_sae
    for where in {sorted(expected)!r}:
        sae, config = load_pretrained_sae("lab/formats/" + where)
        x = torch.randn(8, config["input_dim"], generator=torch.Generator().manual_seed(2))
        out[where] = sae.encode(x).tolist()
    """
    out = run(script, hub.env(tmp_path / "hf"), tmp_path)
    for where, codes in expected.items():
        torch.testing.assert_close(torch.tensor(out[where]), codes, rtol=1e-4, atol=1e-5, msg=where)


@pytest.mark.slow
def test_load_sae_says_what_it_is(hub: LoopbackHub, tmp_path: Path):
    hub.add_repo(RUN51, platform_bundle())
    code = "import sys; from mechint.cli.load_sae import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code]
    env = hub.env(tmp_path / "hf")
    done = subprocess.run([*command, RUN51], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    weights = hashlib.sha256(platform_bundle()["sae_weights.safetensors"]).hexdigest()
    said = ("architecture: topk", f"n_features: {D_SAE}", f"k: {K}", "license: research-only", f"sha256 {weights}")
    assert all(words in done.stdout for words in said), done.stdout
    done = subprocess.run([*command, "lab/none"], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


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
