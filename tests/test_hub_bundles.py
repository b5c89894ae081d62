"""What goes into the bundles of SAEs, steering vectors and investigations, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_material import (
    ELSEWHERE,
    INPUT_DIM,
    N_FEATURES,
    K,
    make_artifact_run,
    make_investigation,
    make_tiny_run,
    make_vector,
    write,
)
from loopback_card import card_errors
from safetensors.torch import load_file, save_file

from mechint.errors import MechintError
from mechint.formats.convert import load
from mechint.formats.mechint import OUR_KEYS
from mechint.hub.bundle import Bundle, StagedFile, staged
from mechint.hub.investigation_bundle import (
    description_of,
    find_artefacts,
    investigation_bundle,
    investigation_repo_name,
    slugs,
    title_of,
)
from mechint.hub.publish import plan
from mechint.hub.sae_bundle import artifact_bundle, artifact_dir, artifact_ids, plain_name, sae_bundle, sae_repo_name
from mechint.hub.steering_bundle import steering_bundle, steering_repo_name
from mechint.provenance import sha256_file
from mechint.runs import Run
from mechint.sae.config import SAEMetadata
from mechint.saelens import SAE, SAEConfig


def stage(bundle: Bundle, repo_id: str, target: Path) -> tuple[dict[str, bytes], dict[str, Any], str]:
    """`(files, bundle_metadata.json, README.md)` as they would go up."""
    with staged(bundle, repo_id) as found:
        assert found.folder is not None
        shutil.copytree(found.folder, target)
    files = {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    return files, strict(files["bundle_metadata.json"]), files["README.md"].decode()


def strict(content: bytes) -> dict[str, Any]:
    """JSON as other languages read it: no NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in JSON")

    return json.loads(content, parse_constant=refuse)


@pytest.mark.parametrize(
    ("run", "model", "name"),
    [
        ("run51", "gpt2-medium", "sae-run51-gpt2-medium"),
        ("run51", "gpt2", "sae-run51-gpt2"),
        ("run7", "Qwen/Qwen2.5-1.5B", "sae-run7-Qwen-Qwen2.5-1.5B"),
        ("run7", None, "sae-run7"),
        ("my run!", "a//b..c", "sae-my-run-a-b.c"),
    ],
)
def test_repository_names_of_saes(run: str, model: str | None, name: str):
    assert sae_repo_name(run, model) == name


def test_repository_names_of_vectors_and_investigations():
    assert steering_repo_name("sentiment-gpt2-medium-l8") == "sv-sentiment-gpt2-medium-l8"
    assert steering_repo_name("refusal-qwen-2.5-1.5b-l10") == "sv-refusal-qwen-2-5-1-5b-l10"
    assert investigation_repo_name("sae_replication_crisis") == "inv-sae-replication-crisis"
    assert len(plain_name("x" * 300)) == 80 and plain_name("-a.") == "a"


# --- numbered runs ----------------------------------------------------------------------------------------------------


def test_a_numbered_run_has_the_platforms_files(tmp_path: Path):
    folder = make_artifact_run(tmp_path / "artifacts")
    bundle = artifact_bundle(artifact_dir(tmp_path / "artifacts", 51), license="MIT")
    assert (bundle.kind, bundle.name) == ("sae", "sae-run51-gpt2-medium")
    names = ["sae_weights.safetensors", "sae_weights.safetensors.json", "environment.json", "feature_analysis.json"]
    assert [row.staged_name for row in plan(bundle, "me/x")] == ["README.md", "bundle_metadata.json", *names]
    files, metadata, card = stage(bundle, "me/x", tmp_path / "out")
    for name in names:
        assert files[name] == (folder / name).read_bytes()
        assert metadata["files"][name]["sha256"] == sha256_file(folder / name)
    assert (metadata["run_id"], metadata["kind"], metadata["license"]) == (51, "sae", "MIT")
    assert metadata["spec"]["parameters"]["hook_site"] == "blocks.8.hook_resid_pre"
    assert metadata["environment"]["seed"] == 7 and metadata["sae_config"]["k"] == K
    assert metadata["result"]["metrics"]["final_loss"] is None  # NaN is no JSON
    assert metadata["manifest"]["artifacts"][0]["path"] == "sae_weights.safetensors"
    assert ELSEWHERE.encode() not in b"".join(files.values())
    assert card_errors(card, "model") == ([], []) and "base_model: openai-community/gpt2-medium" in card
    assert "| `explained_variance` | 0.875 | fraction |" in card and "final_loss" not in card
    assert "| Tokens | 4,096 |" in card and f"| k | {K} |" in card


def test_a_numbered_run_without_records_is_published_with_what_is_there(tmp_path: Path):
    """No result.json once ended the card in a traceback."""
    make_artifact_run(tmp_path, 7, model=None)
    bundle = artifact_bundle(artifact_dir(tmp_path, 7))
    files, metadata, card = stage(bundle, "me/x", tmp_path / "out")
    assert bundle.name == "sae-run7" and metadata["run_id"] == 7
    assert set(files) == {
        "README.md",
        "bundle_metadata.json",
        "sae_weights.safetensors",
        "sae_weights.safetensors.json",
    }
    assert set(metadata) == {"name", "kind", "license", "run_id", "sae_config", "files"}
    assert card_errors(card, "model") == ([], []) and "model-index" not in card and "base_model" not in card
    write(tmp_path / "run-000007" / "result.json", "{not JSON")
    with pytest.raises(MechintError, match="record of the run .*result.json cannot be read"):
        artifact_bundle(tmp_path / "run-000007")


def test_numbered_runs_that_cannot_be_published(tmp_path: Path):
    with pytest.raises(MechintError, match=r"run artifact directory not found: .*run-000051; .* has no runs"):
        artifact_dir(tmp_path, 51)
    folder = make_artifact_run(tmp_path)
    with pytest.raises(MechintError, match=r"run-000052; nearest: 51"):
        artifact_dir(tmp_path, 52)
    (tmp_path / "run-000053").mkdir()
    write(tmp_path / "run-000053" / "spec.json", {})
    with pytest.raises(MechintError, match=r"no SAE in .*run-000053: it has no sae_weights.safetensors, only spec"):
        artifact_bundle(tmp_path / "run-000053")
    assert artifact_ids(tmp_path) == [51]
    (folder / "sae_weights.safetensors.json").unlink()
    with pytest.raises(MechintError, match="top-k without k"):
        artifact_bundle(folder)


def test_what_comes_back_is_compared_with_what_is_here(tmp_path: Path):
    folder = make_artifact_run(tmp_path / "artifacts")
    bundle = artifact_bundle(folder)
    assert bundle.check is not None
    bundle.check(folder)
    other = make_artifact_run(tmp_path / "others", seed=1)
    with pytest.raises(MechintError, match="computes something else than the local one"):
        bundle.check(other)
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["encoder.bias"] = tensors["encoder.bias"] + 0.01
    save_file(tensors, other / "sae_weights.safetensors")
    with pytest.raises(MechintError, match="codes differ by"):
        bundle.check(other)


def test_a_folder_in_saelens_layout_is_published_too(tmp_path: Path):
    """As `mechint export` writes it, or SAELens itself."""
    sae = SAE(SAEConfig(d_in=8, d_sae=16, architecture="jumprelu", metadata=SAEMetadata({"model_name": "gpt2"})))
    sae.save_model(tmp_path / "mine", sparsity=torch.full((16,), -2.0))
    write(tmp_path / "mine" / "notes.txt", "stays here")
    bundle = sae_bundle(tmp_path / "mine")
    files, metadata, card = stage(bundle, "me/x", tmp_path / "out")
    weights = {"sae_weights.safetensors", "cfg.json", "sparsity.safetensors"}
    assert set(files) == {"README.md", "bundle_metadata.json", *weights}
    assert bundle.name == "sae-mine-gpt2" and metadata["run_id"] == "mine"
    assert 'SAE.from_pretrained("me/x")' in card and "base_model: openai-community/gpt2\n" in card
    assert "A jumprelu sparse autoencoder with 16 latents" in card and card_errors(card, "model") == ([], [])
    assert bundle.check is not None
    bundle.check(tmp_path / "out")


# --- run directories --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run(tiny: Run, tmp_path: Path) -> Path:
    """A copy of the run, beside a copy of its activations."""
    shutil.copytree(tiny.path.parent.parent / "activations", tmp_path / "world" / "activations")
    shutil.copytree(tiny.path, tmp_path / "world" / "runs" / "tiny")
    return tmp_path / "world" / "runs" / "tiny"


@pytest.mark.slow
def test_a_run_directory_goes_up_with_its_records(run: Path, tmp_path: Path):
    figures = {"training.png": b"\x89PNG...", "training.csv": b"step,loss\n0,1\n"}
    (run / "figures").mkdir()
    for name, content in figures.items():
        (run / "figures" / name).write_bytes(content)
    write(run / "figures" / "notes.txt", "not a figure")
    write(run / "eval.json", {"rows": "heldout by text", "ce_recovered_mean": 0.75, "fvu": 0.5})
    write(run / "report.html", f"<p>{run}</p>")
    write(run / "private.txt", "stays here")
    bundle = sae_bundle(run)
    files, metadata, card = stage(bundle, "me/x", tmp_path / "out")
    assert set(files) == {
        "README.md",
        "bundle_metadata.json",
        "sae_weights.safetensors",
        "cfg.json",
        "sae_weights.safetensors.json",
        "environment.json",
        "feature_analysis.json",
        "config.json",
        "summary.json",
        "eval.json",
        "manifest.json",
        "metrics.csv",
        "report.html",
        "figures/training.png",
        "figures/training.csv",
    }
    assert str(tmp_path).encode() not in b"".join(files.values())
    assert metadata["run_id"] == "tiny" and metadata["spec"]["architecture"] == "topk"
    sidecar, environment = strict(files["sae_weights.safetensors.json"]), strict(files["environment.json"])
    assert (sidecar["n_features"], sidecar["input_dim"], sidecar["k"]) == (256, 128, 8)
    assert (sidecar["model_name"], sidecar["architecture"]) == ("builtin/pythia-tiny", "topk")
    assert sidecar["training"]["initial_loss"] > sidecar["training"]["final_loss"] > 0
    assert (
        environment["seed"] == 42
        and environment["package_versions"]["torch"] == environment["torch_runtime"]["version"]
    )
    for line in (
        "| `ce_recovered_mean` | 0.75 | fraction |",
        "| `fvu` | 0.5 |",
        "![Training curves](figures/training.png)",
    ):
        assert line in card
    assert "`report.html` is a page" in card and "base_model" not in card and card_errors(card, "model") == ([], [])
    # any tool opens what is at the root: ours, and SAELens's layout beside all the records
    assert load(tmp_path / "out")[0].name == "saelens"
    assert bundle.check is not None
    bundle.check(tmp_path / "out")


@pytest.mark.slow
def test_the_feature_analysis_says_what_each_latent_does(run: Path, tmp_path: Path):
    from mechint.analysis import load_latents

    files, _, _ = stage(sae_bundle(run), "me/x", tmp_path / "out")
    found, latents = strict(files["feature_analysis.json"]), load_latents(run)[0]
    assert found["n_features"] == 256 == len(found["features"]) and found["n_tokens"] == latents.n_rows
    assert found["dead_count"] + found["live_count"] == 256
    assert found["mean_features_per_token"] == pytest.approx(latents.l0)
    busiest = int(latents.counts.argmax())
    feature = found["features"][busiest]
    assert feature["activation_count"] == int(latents.counts[busiest]) and not feature["dead"]
    assert feature["max_activation"] == feature["top_prompts"][0]["activation"] == float(latents.max[busiest])
    assert [prompt["rank"] for prompt in feature["top_prompts"]] == [1, 2, 3, 4, 5]
    assert all(" " in prompt["prompt"] for prompt in feature["top_prompts"])
    assert 0 < feature["coherence_score"] <= 1
    # the same bytes again; without activations no prompts; without tables, or with those of other weights, no file
    assert stage(sae_bundle(run), "me/x", tmp_path / "again")[0] == files
    shutil.move(run.parent.parent / "activations", tmp_path / "moved")
    manifest, config = (json.loads((run / f"{name}.json").read_text()) for name in ("manifest", "config"))
    write(run / "manifest.json", {key: value for key, value in manifest.items() if key != "outputs"})
    write(run / "config.json", config | {"activations_path": "moved"})
    bare = strict(stage(sae_bundle(run), "me/x", tmp_path / "bare")[0]["feature_analysis.json"])
    assert bare["features"][busiest]["top_prompts"] == [] and bare["features"][busiest]["coherence_score"] is None
    record = json.loads((run / "latents.json").read_text())
    write(run / "latents.json", record | {"checkpoint_sha256": "0" * 64})
    assert "feature_analysis.json" not in sae_bundle(run).files


@pytest.mark.slow
def test_runs_that_are_not_whole(run: Path, tmp_path: Path):
    def refused(pattern: str) -> None:
        with pytest.raises(MechintError, match=pattern):
            sae_bundle(run)

    summary = (run / "summary.json").read_bytes()
    (run / "summary.json").unlink()
    refused(r"has no summary.json.*train_sae.py --config .*config.json.*mechint verify")
    (run / "summary.json").write_bytes(summary.replace(b"fvu", b"FVU"))
    refused(r"summary.json is not the file that the run wrote .*mechint verify")
    (run / "summary.json").write_bytes(summary)
    weights = (run / "sae" / "sae_weights.safetensors").read_bytes()
    (run / "sae" / "sae_weights.safetensors").unlink()
    refused(r"lacks sae/sae_weights.safetensors")
    (run / "sae" / "sae_weights.safetensors").write_bytes(weights)
    sae_bundle(run)
    (run / "manifest.json").rename(tmp_path / "manifest.json")
    refused(r"is not finished .*train_sae.py --resume")
    (run / "config.json").unlink()
    refused(r"has no config.json: not a run directory")
    with pytest.raises(MechintError, match="run directory not found"):
        sae_bundle(tmp_path / "nowhere")


@pytest.mark.slow
def test_a_run_of_the_first_pipeline_has_its_layout_made(run: Path, tmp_path: Path):
    """No sae/ folder and a manifest without hashes: weights and settings are made from checkpoint.pt."""
    shutil.rmtree(run / "sae")
    manifest = json.loads((run / "manifest.json").read_text())
    write(run / "manifest.json", {key: manifest[key] for key in ("checkpoint_path", "config", "summary", "git_commit")})
    config = json.loads((run / "config.json").read_text())
    write(run / "config.json", {key: value for key, value in config.items() if key not in OUR_KEYS})
    with pytest.warns(UserWarning, match="taken as the original pipeline's setting"):
        bundle = sae_bundle(run)
    _, _, card = stage(bundle, "me/x", tmp_path / "out")
    assert "| Activations | not recorded; taken as the first pipeline's: minus their mean" in card
    assert bundle.check is not None
    bundle.check(tmp_path / "out")
    theirs, ours = load(tmp_path / "out")[1], torch.load(run / "checkpoint.pt", weights_only=True)
    assert torch.equal(theirs.weights()["W_dec"], ours["W_dec"])


@pytest.mark.slow
def test_models_and_data_sets_of_the_hub_are_named(run: Path):
    """The name alone does not decide: a folder `texts/mine` looks like a data set of the Hub."""
    manifest, config = json.loads((run / "manifest.json").read_text()), json.loads((run / "config.json").read_text())
    del manifest["outputs"]

    def card(model: str, dataset: str, **source: Any) -> str:
        write(run / "config.json", config | {"model_name": model, "dataset_name": dataset})
        inputs = {"activations": {"dataset_name": dataset, **source}}
        write(run / "manifest.json", manifest | {"inputs": inputs})
        bundle = sae_bundle(run)
        files = {name: StagedFile("0" * 64, 1) for name in bundle.files}
        whole.append(bundle.card("me/x", files))
        return whole[-1].split("\n---\n")[0]

    whole: list[str] = []
    found = card("EleutherAI/pythia-70m", "openwebtext", model_revision="abc", dataset_revision="def")
    assert "base_model: EleutherAI/pythia-70m\n" in found and "datasets:\n- Skylion007/openwebtext\n" in found
    assert "base_model: EleutherAI/pythia-70m\n" in card("pythia-70m", "x/y")  # older manifests say nothing
    found = card("models/mine", "texts/mine", model_revision=None, dataset_revision=None)
    assert "base_model" not in found and "datasets" not in found
    assert "datasets" not in card("pythia-70m", "texts/mine.txt")
    assert "HookedSAETransformer.from_pretrained" in whole[-1]
    # a bare .pt has no record: what the settings call the model is then only their default
    unknown = dict.fromkeys(("model_sha256", "model_source", "model_revision", "texts_sha256", "dataset_revision"))
    found = card("pythia-70m", "openwebtext", **unknown)
    assert "base_model" not in found and "datasets:" not in found
    assert "openwebtext" not in whole[-1].split("## Training")[0]
    assert "HookedSAETransformer" not in whole[-1] and "by the settings; the activations do not say" in whole[-1]


# --- steering vectors -------------------------------------------------------------------------------------------------


def registry(folder: Path, **entry: Any) -> Path:
    entry = {"model_name": "gpt2-medium", "hook_site": "blocks.8.hook_resid_pre", "license": "MIT"} | entry
    return write(folder / "registry.json", {"steering_vectors": {"mine-l8": entry}})


def test_a_vector_by_its_folder(tmp_path: Path):
    folder = make_vector(tmp_path / "female-male")
    bundle = steering_bundle(folder)
    files, metadata, card = stage(bundle, "me/sv-x", tmp_path / "out")
    assert set(files) == {
        "README.md",
        "bundle_metadata.json",
        "direction.safetensors",
        "direction.safetensors.json",
    }
    assert (metadata["name"], metadata["kind"], metadata["license"]) == ("female-male", "steering", "MIT")
    assert metadata["model_name"] == "builtin/pythia-tiny" and metadata["direction_norm"] == 15.25
    assert metadata["extraction_quality"] == 1.5 and metadata["female_prompt_count"] == 20
    assert "license: mit\n" in card and "base_model" not in card and card_errors(card, "model") == ([], [])
    assert "| Prompts | 20 female, 22 male |" in card and "| `direction_norm` | 15.25 | activation |" in card
    (tmp_path / "alone").mkdir()
    shutil.copy(folder / "direction.safetensors", tmp_path / "alone" / "tired.safetensors")
    bundle = steering_bundle(tmp_path / "alone" / "tired.safetensors")
    files, metadata, _ = stage(bundle, "me/sv-x", tmp_path / "out2")
    assert metadata["name"] == "tired" and metadata["license"] == "research-only"
    assert "direction.safetensors" in files and "direction.safetensors.json" not in files


def test_a_registry_wins_over_a_sidecar_in_what_it_states(tmp_path: Path):
    """A sidecar once replaced name, kind and licence."""
    make_vector(
        tmp_path / "v",
        name="other",
        kind="sae",
        license="apache-2.0",
        model="openai-community/gpt2-medium",
        hook_site="blocks.8.hook_resid_pre",
        direction_norm=15.3621,
    )
    file = registry(tmp_path, local_path="v", direction_norm=15.36, description="Mine.")
    bundle = steering_bundle("mine-l8", registry=file)
    _, metadata, card = stage(bundle, "me/x", tmp_path / "out")
    assert (metadata["name"], metadata["kind"], metadata["license"]) == ("mine-l8", "steering", "MIT")
    assert metadata["direction_norm"] == 15.3621 and metadata["description"] == "Mine."  # a registry rounds norms
    assert card.startswith("---\nbase_model: openai-community/gpt2-medium\n")
    assert steering_bundle("mine-l8", registry=file, license="CC-BY-4.0").license == "CC-BY-4.0"
    moved = shutil.move(tmp_path / "v", tmp_path / "elsewhere")
    with pytest.raises(MechintError, match="mine-l8 is not at .*nothing to upload"):
        steering_bundle("mine-l8", registry=file)
    make_vector(tmp_path / "v", hook_site="blocks.3.hook_resid_pre")
    with pytest.raises(MechintError, match="states model_name gpt2-medium, its sidecar builtin/pythia-tiny"):
        steering_bundle("mine-l8", registry=file)
    shutil.rmtree(tmp_path / "v")
    make_vector(tmp_path / "v", model="gpt2-medium")
    with pytest.raises(MechintError, match="states hook_site blocks.8.hook_resid_pre, its sidecar blocks.3"):
        steering_bundle("mine-l8", registry=file)
    assert Path(moved).is_dir()


def test_vectors_that_cannot_be_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MechintError, match="unknown steering vector 'sentiment-gpt2'.* sentiment-gpt2-medium-l8"):
        steering_bundle("sentiment-gpt2")
    with pytest.raises(MechintError, match="sentiment-gpt2-medium-l8 is not at steering"):
        steering_bundle("sentiment-gpt2-medium-l8")
    folder = make_vector(tmp_path / "v")
    save_file(
        {"direction": 2 * load_file(folder / "direction.safetensors")["direction"]}, folder / "direction.safetensors"
    )
    with pytest.raises(MechintError, match="norm 2"):
        steering_bundle(folder)
    save_file({"vector": torch.ones(1)}, folder / "direction.safetensors")
    with pytest.raises(MechintError, match="no key 'direction'"):
        steering_bundle(folder)
    file = registry(tmp_path, hf_repo="me/sv-mine")
    with pytest.raises(MechintError, match="not on this machine.*it is published as me/sv-mine already"):
        steering_bundle("mine-l8", registry=file)


def test_another_direction_does_not_pass_for_the_local_one(tmp_path: Path):
    bundle = steering_bundle(make_vector(tmp_path / "a"))
    assert bundle.check is not None
    bundle.check(tmp_path / "a")
    with pytest.raises(MechintError, match="not the local one"):
        bundle.check(make_vector(tmp_path / "b", seed=1))


# --- investigations ---------------------------------------------------------------------------------------------------


def test_every_artefact_keeps_its_name_and_the_writeup_its_text(tmp_path: Path):
    """Artefacts *.md once all became investigation.md, and one called README.md replaced the card."""
    make_investigation(tmp_path / "docs")
    folder = tmp_path / "docs" / "publications" / "sae_replication_crisis_artifacts"
    bundle = investigation_bundle("sae_replication_crisis", docs=tmp_path / "docs")
    files, metadata, card = stage(bundle, "me/x", tmp_path / "out")
    writeup = tmp_path / "docs" / "investigations" / "sae_replication_crisis.md"
    same = {
        "investigation.md": writeup,
        "paper.md": folder / "paper.md",
        "figures/README.md": folder / "figures" / "README.md",
        "figures/data.csv": folder / "figures" / "data.csv",
        "artifacts/README.md": folder / "README.md",
        "artifacts/investigation.md": folder / "investigation.md",
    }
    assert set(files) == {*same, "metrics.json", "README.md", "bundle_metadata.json"}
    for name, path in same.items():
        assert files[name] == path.read_bytes()
    assert json.loads(files["metrics.json"]) == {"replicated": 0.4, "file": "metrics.json"}
    assert card.startswith("---\n") and "# The SAE replication crisis\n" in card
    assert card_errors(card, "model") == ([], [])
    said = {key: metadata[key] for key in ("slug", "title", "description", "license", "has_publication_artifacts")}
    assert said == {
        "slug": "sae_replication_crisis",
        "title": "The SAE replication crisis",
        "description": "Do latents | replicate?",
        "license": "CC-BY-4.0",
        "has_publication_artifacts": True,
    }


def test_where_artefacts_are_looked_for(tmp_path: Path):
    docs = tmp_path / "docs"
    write(docs / "investigations" / "sae_replication_crisis.md", "# X\n")
    found = find_artefacts("sae_replication_crisis", docs)
    assert found.folder is None and "no artefacts" in found.note and "--artifact-root" in found.note
    bundle = investigation_bundle("sae_replication_crisis", docs=docs)
    assert set(bundle.files) == {"investigation.md"} and bundle.metadata["has_publication_artifacts"] is False
    # a folder that shares the slug's beginning, as the platform's own one does
    near = write(docs / "publications" / "sae_replication_artifacts" / "a.json", {}).parent
    found = find_artefacts("sae_replication_crisis", docs)
    assert found.folder == near and "no other investigation begins so" in found.note
    write(docs / "investigations" / "sae_replication_followup.md", "# Y\n")
    found = find_artefacts("sae_replication_crisis", docs)
    assert found.folder is None and "may be meant: give it as --artifact-root" in found.note
    plain = write(docs / "publications" / "sae_replication_crisis" / "b.json", {}).parent
    assert find_artefacts("sae_replication_crisis", docs).folder == plain
    first = write(docs / "publications" / "sae_replication_crisis_artifacts" / "c.json", {}).parent
    assert find_artefacts("sae_replication_crisis", docs).folder == first
    assert find_artefacts("sae_replication_crisis", docs, near).folder == near
    with pytest.raises(MechintError, match="is not a folder"):
        find_artefacts("sae_replication_crisis", docs, docs / "nowhere")
    write(docs / "investigations" / "index.md", "# Index\n")
    assert slugs(docs) == ["sae_replication_crisis", "sae_replication_followup"]


def test_investigations_that_cannot_be_published(tmp_path: Path):
    docs = tmp_path / "docs"
    make_investigation(docs)
    folder = docs / "publications" / "sae_replication_crisis_artifacts"
    with pytest.raises(MechintError, match="investigation not found: .*sae_replication.md; .*sae_replication_crisis"):
        investigation_bundle("sae_replication", docs=docs)
    for slug in ("../secret", "a/b", "", ".."):
        with pytest.raises(MechintError, match="should be the name of a file"):
            investigation_bundle(slug, docs=docs)
    write(docs / "investigations" / "empty.md", " \n")
    with pytest.raises(MechintError, match="is empty"):
        investigation_bundle("empty", docs=docs)
    write(folder / "artifacts" / "README.md", "would be hidden by the other one")
    with pytest.raises(MechintError, match="would both be artifacts/README.md"):
        investigation_bundle("sae_replication_crisis", docs=docs)
    shutil.rmtree(folder / "artifacts")
    write(tmp_path / "secret.txt", "secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(MechintError, match="link that leads out"):
        investigation_bundle("sae_replication_crisis", docs=docs)


@pytest.mark.parametrize(
    ("text", "title", "description"),
    [
        ("# A title\n\nFirst line.\nSecond.\n", "A title", "First line."),
        ("---\ntitle: x\n---\n# T\n## Sub\n\n> Quoted\n", "T", "> Quoted"),
        ("```python\n# not a title\n```\n\nText\n# Later\n", "Later", "Text"),
        ("No heading at all\n", "My slug", "No heading at all"),
        ("# Only a title\n", "Only a title", "Investigation: Only a title"),
        ("\ufeff# With a mark\r\n\r\nWindows.\r\n", "With a mark", "Windows."),
        ("# T\n\n---\n\n" + "long " * 80, "T", ("long " * 39).rstrip() + "..."),
        ("---\nno end of front matter\n", "My slug", "no end of front matter"),
    ],
)
def test_title_and_description_of_a_writeup(text: str, title: str, description: str):
    assert title_of(text, "my_slug") == title
    found = description_of(text, "my_slug")
    assert found == description and len(found) <= 200


def test_widths_are_those_of_the_material():
    assert N_FEATURES > K and INPUT_DIM > 1
