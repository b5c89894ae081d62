"""The publish commands from the command line to a loopback Hub and back, with the real client, in fresh processes."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hub_material import make_artifact_run, make_investigation, make_tiny_run, make_vector, write
from loopback_hub import DEFAULT_TOKEN, LoopbackHub, closed_endpoint

from mechint.cli import publish_all, publish_investigation, publish_sae, publish_steering
from mechint.provenance import sha256_file

ROOT = Path(__file__).resolve().parent.parent
RUN_CARD, ARTIFACT_CARD = "sae-tiny-builtin-pythia-tiny", "sae-run51-gpt2-medium"
VECTOR_CARD, INVESTIGATION_CARD = "sv-female-male", "inv-sae-replication-crisis"


def environment(env: dict[str, str]) -> dict[str, str]:
    """The environment of a child that finds this checkout from any folder."""
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def run_command(module: str, words: list[str], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`mechint COMMAND` in a process of its own."""
    code = f"import sys; from mechint.cli.{module} import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cwd,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each: a numbered run, a run directory, a vector, an investigation."""
    root = tmp_path_factory.mktemp("world")
    make_artifact_run(root / "artifacts")
    make_vector(root / "steering" / "female-male", width=128)
    make_investigation(root / "docs")
    make_tiny_run(root)
    return root


# --- without a network ------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which nothing could reach a Hub and no token is known."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", closed_endpoint())
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-home"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table_of(out: str) -> dict[str, tuple[str, str]]:
    """Staged name -> (source, size) of a dry run's table."""
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in out.splitlines()]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3 and row[0] != "Staged name"}


def test_the_dry_run_of_a_numbered_run_is_the_seeds_example(offline: Path, capsys: pytest.CaptureFixture[str]):
    make_artifact_run(offline / "artifacts")
    assert publish_sae.main(["--run-id", "51", "--repo", "myorg/sae-run51-gpt2-medium", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "mech publish" in out.splitlines()[0]
    for line in ("DRY RUN — no files uploaded", "Bundle: sae-run51-gpt2-medium", "Kind:   sae", "Target: http"):
        assert line in out
    assert "Files that would be uploaded" in out
    assert list(found := table_of(out)) == [
        "README.md",
        "bundle_metadata.json",
        "sae_weights.safetensors",
        "sae_weights.safetensors.json",
        "environment.json",
        "feature_analysis.json",
    ]
    assert found["README.md"][0] == found["bundle_metadata.json"][0] == "(generated)"
    assert found["environment.json"][0] == "artifacts/run-000051/environment.json"
    assert re.fullmatch(r"\d+(\.\d)? (B|KB)", found["sae_weights.safetensors"][1])
    assert not (offline / "no-home").exists()


def test_dry_runs_of_a_vector_and_of_an_investigation(offline: Path, capsys: pytest.CaptureFixture[str]):
    make_vector(offline / "v" / "female-male")
    make_investigation(offline / "docs")
    assert publish_steering.main(["--vector", "v/female-male", "--repo", "me/sv-x", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Bundle: female-male" in out and "Kind:   steering" in out
    assert list(table_of(out))[2:] == ["direction.safetensors", "direction.safetensors.json"]
    words = ["--slug", "sae_replication_crisis", "--repo", "me/inv-x", "--dry-run"]
    assert publish_investigation.main(words) == 0
    out = capsys.readouterr().out
    assert "Bundle: inv-sae-replication-crisis" in out and "Kind:   investigation" in out
    assert set(table_of(out)) == {
        "README.md",
        "bundle_metadata.json",
        "investigation.md",
        "metrics.json",
        "paper.md",
        "figures/README.md",
        "figures/data.csv",
        "artifacts/README.md",
        "artifacts/investigation.md",
    }
    assert "artefacts: docs/publications/sae_replication_crisis_artifacts" in out


def test_publish_all_goes_on_after_errors_and_says_so(offline: Path, capsys: pytest.CaptureFixture[str]):
    make_artifact_run(offline / "artifacts")
    make_artifact_run(offline / "artifacts", 52, model=None)
    broken = make_artifact_run(offline / "artifacts", 53)
    (broken / "sae_weights.safetensors").write_bytes(b"not safetensors")
    (offline / "artifacts" / "run-000054").mkdir()  # a run without weights is none that could be published
    make_vector(offline / "steering" / "a.b")
    make_investigation(offline / "docs")
    write(offline / "docs" / "investigations" / "index.md", "# Index\n")
    assert publish_all.main(["--user", "me", "--dry-run"]) == 1
    out = capsys.readouterr().out
    bundles = re.findall(r"Bundle: (\S+)", out)
    assert bundles == ["sae-run51-gpt2-medium", "sae-run52", "a.b", "inv-sae-replication-crisis"]
    targets = re.findall(r"Target: \S+/(me/\S+)", out)
    assert targets == [f"me/{name}" for name in ("sae-run51-gpt2-medium", "sae-run52", "sv-a-b", bundles[-1])]
    assert re.search(r"^SKIP run 53: .*sae_weights.safetensors", out, re.MULTILINE)
    assert "not on this machine, left out: helpfulness-qwen-2.5-0.5b-l8" in out
    assert out.splitlines()[-1] == "Dry run complete. 4 bundle(s) previewed, 1 skipped."
    assert publish_all.main(["--user", "me", "--sae-run-ids", "51,99", "--dry-run"]) == 1
    out = capsys.readouterr().out
    assert "SKIP run 99: run artifact directory not found: artifacts/run-000099" in out and "sae-run52" not in out
    assert publish_all.main(["--user", "me", "--sae-run-ids", "51", "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("3 bundle(s) previewed, 0 skipped.\n")


def test_two_things_of_one_name_do_not_overwrite_each_other(offline: Path, capsys: pytest.CaptureFixture[str]):
    make_vector(offline / "steering" / "a.b")
    make_vector(offline / "steering" / "a-b", seed=1)
    assert publish_all.main(["--user", "me", "--dry-run"]) == 1
    out = capsys.readouterr().out
    assert "another one goes to me/sv-a-b already" in out and "1 bundle(s) previewed, 1 skipped." in out


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (publish_sae, ["--repo", "me/x"], "--run-id N"),
        (publish_sae, ["--repo", "me/x", "--run-id", "1", "--run-dir", "r"], "--run-id N"),
        (publish_sae, ["--repo", "me", "--run-id", "1"], "user/name"),
        (publish_sae, ["--repo", "me/a--b", "--run-id", "1"], "user/name"),
        (publish_sae, ["--repo", "me/x", "--run-id", "7"], "run artifact directory not found: artifacts/run-000007"),
        (publish_sae, ["--repo", "me/x", "--run-dir", "nowhere"], "run directory not found: nowhere"),
        (publish_steering, ["--repo", "me/x", "--vector", "sentimnt-gpt2-medium-l8"], "sentiment-gpt2-medium-l8"),
        (publish_steering, ["--repo", "me/x", "--vector", "sentiment-gpt2-medium-l8"], "not at steering/sentiment"),
        (publish_investigation, ["--repo", "me/x", "--slug", "no_such"], "investigation not found"),
        (publish_investigation, ["--repo", "me/x", "--slug", "../x"], "name of a file"),
        (publish_all, ["--user", "me/x"], "without '/'"),
        (publish_all, ["--user", "me", "--sae-run-ids", "51,x"], "numbers with commas"),
        (publish_all, ["--user", "me"], "nothing to publish"),
        (publish_all, ["--user", "me", "--license", "a\nb"], "--license should be a licence's name"),
    ],
)
def test_mistakes_are_one_line(main, words: list[str], said: str, offline: Path, capsys: pytest.CaptureFixture[str]):  # noqa: ANN001
    assert main.main([*words, "--dry-run"]) == 2
    told = capsys.readouterr()
    assert said in told.err and told.err.count("\n") == 1 and told.out == ""


@pytest.mark.slow
def test_a_dry_run_asks_nothing_of_any_network(tmp_path: Path):
    make_artifact_run(tmp_path / "artifacts")
    make_vector(tmp_path / "steering" / "v")
    make_investigation(tmp_path / "docs")
    with LoopbackHub(tmp_path / "hub") as hub:
        done = run_command("publish_all", ["--user", "me", "--dry-run"], tmp_path, hub.env(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        assert "3 bundle(s) previewed, 0 skipped." in done.stdout
        assert hub.seen() == []


def test_commands_start_without_torch():
    code = """
    import sys
    from mechint.cli import publish_all, publish_investigation, publish_sae, publish_steering
    heavy = {"torch", "huggingface_hub", "transformers", "rich"} & set(sys.modules)
    assert not heavy, heavy
    """
    env = environment(dict(os.environ))
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, check=True, timeout=120)


# --- to the Hub and back ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(world: Path, tmp_path_factory: pytest.TempPathFactory):
    """The loopback Hub after one `publish-all` of the whole world, and what the command printed."""
    folder = tmp_path_factory.mktemp("hub")
    with LoopbackHub(folder, orgs=("lab",)) as hub:
        words = ["--user", "lab", "--run-dirs", "runs/tiny"]
        done = run_command("publish_all", words, world, hub.env(folder / "home", token=DEFAULT_TOKEN))
        yield hub, done, folder


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", card, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_publish_all_publishes_everything_in_one_commit_each(published, world: Path):
    hub, done, _ = published
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "Publishing complete. 4 bundle(s) published, 0 skipped."
    names = {repo for kind, repo in hub.repos if kind == "model"}
    assert names == {f"lab/{name}" for name in (RUN_CARD, ARTIFACT_CARD, VECTOR_CARD, INVESTIGATION_CARD)}
    for repo in names:
        history = hub.history(repo)
        assert len(history) == 2, [commit.title for commit in history]  # the Hub's own first one, and ours
        files = hub.files(repo)
        metadata = json.loads(files["bundle_metadata.json"])
        staged = set(files) - {"bundle_metadata.json", ".gitattributes"}
        assert set(metadata["files"]) == staged
        text = b"".join(content for name, content in files.items() if not name.endswith((".safetensors", ".png")))
        assert str(world).encode() not in text and b"/home/somebody" not in text and DEFAULT_TOKEN.encode() not in text
    weights = hub.files(f"lab/{RUN_CARD}")["sae_weights.safetensors"]
    assert weights == (world / "runs" / "tiny" / "sae" / "sae_weights.safetensors").read_bytes()
    writeup = hub.files(f"lab/{INVESTIGATION_CARD}")["investigation.md"].decode()
    assert "The whole *writeup*." in writeup


@pytest.mark.slow
def test_a_second_publish_all_makes_no_commit(published, world: Path):
    hub, _, folder = published
    before = {repo: hub.repos["model", repo].at("main").sha for kind, repo in hub.repos if kind == "model"}
    words = ["--user", "lab", "--run-dirs", "runs/tiny"]
    done = run_command("publish_all", words, world, hub.env(folder / "home", token=DEFAULT_TOKEN))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 bundle(s) published (4 unchanged), 0 skipped." in done.stdout
    assert before == {repo: hub.repos["model", repo].at("main").sha for kind, repo in hub.repos if kind == "model"}


@pytest.mark.slow
@pytest.mark.parametrize("repo", [RUN_CARD, ARTIFACT_CARD, VECTOR_CARD, INVESTIGATION_CARD])
def test_every_snippet_of_every_card_runs(repo: str, published, tmp_path: Path):
    hub, _, _ = published
    card = hub.files(f"lab/{repo}")["README.md"].decode()
    snippets = blocks(card, "python")
    assert snippets, card
    env = environment(hub.env(tmp_path / "home"))
    for snippet in snippets:
        assert f'"lab/{repo}"' in snippet
        done = subprocess.run(
            [sys.executable, "-c", snippet], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{snippet}\n{done.stderr[-3000:]}"
        assert done.stdout.strip()
    for line in "".join(blocks(card, "bash")).splitlines():
        program, name, *words = shlex.split(line)
        assert program == "mechint"
        done = run_command(name.replace("-", "_"), words, tmp_path, hub.env(tmp_path / "home"))
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"


@pytest.mark.slow
def test_publish_all_without_a_token_says_once_how_to_log_in(world: Path, tmp_path: Path):
    with LoopbackHub(tmp_path) as hub:
        done = run_command("publish_all", ["--user", "tester"], world, hub.env(tmp_path / "home"))
        assert done.returncode == 2 and done.stdout == ""
        assert "hf auth login" in done.stderr and done.stderr.count("\n") == 1
        words = ["--user", "somebody", "--sae-run-ids", "51"]
        done = run_command("publish_all", words, world, hub.env(tmp_path / "home", token=DEFAULT_TOKEN))
        assert done.returncode == 1 and done.stdout.count("SKIP ") == 3, done.stdout + done.stderr
        assert "belongs to somebody, and you are logged in as tester" in done.stdout
        assert done.stdout.splitlines()[-1] == "Publishing complete. 0 bundle(s) published, 3 skipped."
        assert not hub.repos


@pytest.mark.slow
def test_what_was_published_computes_the_same_in_a_new_process(published, world: Path, tmp_path: Path):
    hub, _, _ = published
    script = f"""
    import json, sys
    import torch
    from mechint import SAE
    from mechint.sae.load import load_pretrained_sae
    from mechint.hub.steering_loading import load_steering_vector

    out = {{}}
    for repo, local in (("lab/{RUN_CARD}", "runs/tiny"), ("lab/{ARTIFACT_CARD}", "artifacts/run-000051")):
        theirs, config = load_pretrained_sae(repo)
        ours = SAE.load_from_disk(local)
        x = 5 * torch.randn(200, ours.cfg.d_in, generator=torch.Generator().manual_seed(3))
        same = torch.equal(ours.encode(x), theirs.encode(x)) and torch.equal(ours(x), theirs(x))
        said = [config[key] for key in ("hook_site", "model_name", "license")]
        out[repo] = [same, int((ours.encode(x) != 0).sum()), *said]
    direction, metadata = load_steering_vector("lab/{VECTOR_CARD}")
    local, _ = load_steering_vector("steering/female-male")
    out["vector"] = [torch.equal(direction, local), metadata["direction_norm"], metadata["license"]]
    print(json.dumps(out))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=world,
        env=environment(hub.env(tmp_path / "home")),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads(done.stdout.splitlines()[-1])
    same, active, hook, model, license = out[f"lab/{RUN_CARD}"]
    assert same and active > 0
    assert (hook, model, license) == ("blocks.3.hook_resid_post", "builtin/pythia-tiny", "research-only")
    same, active, hook, model, _ = out[f"lab/{ARTIFACT_CARD}"]
    assert same and active == 200 * 4 and (hook, model) == ("blocks.8.hook_resid_pre", "gpt2-medium")
    assert out["vector"] == [True, 15.25, "MIT"]


@pytest.mark.slow
def test_push_run_and_the_flags_of_an_upload(world: Path, tmp_path: Path):
    with LoopbackHub(tmp_path) as hub:
        env = hub.env(tmp_path / "home", token=DEFAULT_TOKEN)
        words = ["runs/tiny", "--repo", "tester/mine", "--license", "MIT", "--private", "--commit-message", "Mine"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "push_run.py"), *words, "--no-create-repo"],
            cwd=world,
            env=environment(env),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 2 and not hub.repos, done.stdout + done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: tester/mine is not on the Hub")
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "push_run.py"), *words],
            cwd=world,
            env=environment(env),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        repo = hub.repos["model", "tester/mine"]
        assert repo.private and hub.history("tester/mine")[0].title == "Mine"
        assert "\nlicense: mit\n" in hub.files("tester/mine")["README.md"].decode()
        assert json.loads(hub.files("tester/mine")["bundle_metadata.json"])["license"] == "MIT"
        recorded = json.loads(hub.files("tester/mine")["bundle_metadata.json"])["files"]
        local = world / "runs" / "tiny" / "sae" / "sae_weights.safetensors"
        assert recorded["sae_weights.safetensors"]["sha256"] == sha256_file(local)
