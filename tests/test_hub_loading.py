"""SAEs and steering vectors from a loopback Hub in fresh processes, and again from the cache."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import other_formats
import pytest
import torch
from loopback_hub import LoopbackHub
from published import (
    D_IN,
    D_SAE,
    RUN51,
    VECTOR,
    K,
    a_direction,
    metadata_of,
    platform_bundle,
    platform_tensors,
    run,
    vector_bundle,
)
from safetensors.torch import save

from mechint.formats import FORMATS, reference_encode


@pytest.fixture()
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "server") as server:
        yield server


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
    from mechint.sae.load import load_pretrained_sae as sae
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
def test_the_shipped_names_lead_to_saes_that_subtract_b_dec(hub: LoopbackHub, tmp_path: Path):
    """The repository's old cfg.json does not say so; without it the codes would be others'."""
    t = other_formats.make("standard", d_in=D_IN, d_sae=D_SAE).weights()
    cfg = {"model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre", "d_in": D_IN, "d_sae": D_SAE}
    folder = "blocks.8.hook_resid_pre"
    files = {f"{folder}/cfg.json": json.dumps(cfg).encode(), f"{folder}/sae_weights.safetensors": save(t)}
    files[f"{folder}/sparsity.safetensors"] = save({"sparsity": torch.full((D_SAE,), -3.0)})
    hub.add_repo("jbloom/GPT2-Small-SAEs-Reformatted", files | {f"blocks.6.hook_resid_pre/{i}.bin": b"x" for i in "ab"})
    script = f"""
    from mechint.hub import SAE_REGISTRY, load_pretrained_sae
    from dataclasses import replace
    name = "neelnanda-gpt2-small-res-jb-l8"
    small = {{"n_features": {D_SAE}, "input_dim": {D_IN}}}
    SAE_REGISTRY[name] = replace(SAE_REGISTRY[name], config=SAE_REGISTRY[name].config | small)
    sae, out["config"] = load_pretrained_sae(name)
    out["codes"] = sae.encode(torch.randn(9, {D_IN}, generator=torch.Generator().manual_seed(4))).tolist()
    out["processing"], out["sparsity"] = sae.cfg.metadata.processing, sae.sparsity.tolist()
    """
    out = run(script, hub.env(tmp_path / "hf"), tmp_path)
    x = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(torch.tensor(out["codes"]), ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu())
    assert out["processing"] == "centred" and out["sparsity"] == [-3.0] * D_SAE
    assert (out["config"]["hook_site"], out["config"]["k"]) == (folder, None)
    assert {request.path.split("/resolve/")[1].split("/")[1] for request in hub.seen("HEAD", "/resolve/")} == {folder}


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
    from mechint.sae.load import load_pretrained_sae, open_pretrained_sae
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
    from mechint.sae.load import load_pretrained_sae
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
