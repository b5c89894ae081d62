"""Sweeps of our own as repositories, and the collections that repositories go to."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dinov3_world import ROOT
from loopback_card import card_errors
from loopback_collections import Collection
from loopback_hub import LoopbackHub, client_env, closed_endpoint

from mechint.config import SweepConfig
from mechint.errors import MechintError
from mechint.hub.sweep_members import choose_members, convert_members
from mechint.provenance import read_json, write_json
from mechint.train.sweep import conclude, start, train_members

SLUG = "tester/sae-v-0123456789abcdef01234567"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four standard and two top-k members on 24 wide activations, and one that failed."""
    root = tmp_path_factory.mktemp("sweep")
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(60, 24, generator=generator), dim=1)
    strengths = torch.rand(3000, 60, generator=generator) * 3 * (torch.rand(3000, 60, generator=generator) < 0.05)
    torch.save(strengths @ directions + 0.3, root / "acts.pt")
    config = SweepConfig(
        activations_path=str(root / "acts.pt"),
        architecture=("standard", "topk"),
        expansion=(2,),
        l1_lambda=(0.5, 2.0, 8.0, 9.0),
        k=(2.0, 6.0),
        learning_rate=(3e-3,),
        epochs=40,
        settings=(
            "batch_size=256",
            "warmup_steps=5",
            "lambda_warmup_steps=10",
            "model_name=pythia-70m",
            "model_source=EleutherAI/pythia-70m",
            "dataset_name=openwebtext",
            "hook_name=blocks.3.hook_resid_post",  # what rows in a bare .pt do not say
        ),
        name="small",
        runs_root=str(root / "runs"),
        device="cpu",
        eval_texts=0,
    )
    made, activations = start(config)
    names = [member.name for member in made.members]
    train_members(made, names, activations, progress=False, n_threads=1)
    conclude(made, activations, progress=False)
    for member in made.members:  # as if an older version had trained them
        manifest = read_json(member.path / "manifest.json")
        write_json(member.path / "manifest.json", {**manifest, "git_commit": "0123abc"})
    failed = next(member for member in made.members if "9" in member.name)
    (failed.path / "manifest.json").unlink()
    failed.fail("the loss became nan")
    return made.path


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub") as hub:
        yield hub


def run(code: str, *args: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *args], env=env, cwd=cwd, capture_output=True, text=True)


MAIN = "import sys\nfrom mechint.cli.publish_sweep import main\nsys.exit(main(sys.argv[1:]))"


# --- sweeps of ours ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("format", ["saelens", "saev"])
def test_a_sweep_goes_up_and_a_stranger_loads_it(format: str, sweep: Path, hub: LoopbackHub, tmp_path: Path):
    env = hub.env(tmp_path / "hf", token=hub.token)
    flags = [str(sweep), "--repo", "tester/small", "--format", format, "--max-per-layer", "4", "--license", "mit"]
    done = run(MAIN, *flags, "--collection", "My SAEs", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = hub.files("tester/small")
    rows = [json.loads(line) for line in files["manifest.jsonl"].decode().splitlines()]
    assert 2 <= len(rows) <= 4 and [row["l0"] for row in rows] == sorted(row["l0"] for row in rows)
    names = {"saelens": ("cfg.json", "sae_weights.safetensors"), "saev": ("sae.pt",)}[format]
    folders = {row["path"].rsplit("/", 1)[0] for row in rows}
    own = {".gitattributes", "README.md", "manifest.jsonl", "bundle_metadata.json"}
    assert set(files) == own | {f"{folder}/{name}" for folder in folders for name in names}
    for row in rows:
        summary = read_json(sweep / row["run_id"] / "summary.json")
        assert (row["l0"], row["nmse"]) == (summary["l0"], summary["fvu"])
        assert row["path"].startswith(f"layer_3/{row['run_id']}/")
    card = files["README.md"].decode()
    assert card_errors(card, "model") == ([], []) and "| Run ID | Layer | L0 | NMSE | Path |" in card
    assert str(tmp_path) not in b"".join(files.values()).decode(errors="replace")
    assert str(sweep.parent) not in b"".join(files.values()).decode(errors="replace")
    assert "the loss became nan" in done.stderr
    if format == "saev":  # it keeps negative entries of a top-k, which ours have not
        assert "topk" not in "".join(row["run_id"] for row in rows) and "left out" in done.stderr
    assert [c.title for c in hub.collections.values()] == ["My SAEs"]

    # the README's own lines, in a process that knows nothing of the sweep; the same codes as the run's own SAE
    snippet = card.split("```python\n")[1].split("```")[0]
    code = f"""
{snippet}
import torch
from mechint.sae import load_sae
ours = load_sae({str(sweep / rows[-1]["run_id"])!r})
x = torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
difference = (sae.encode(x) - ours.encode(x)).abs().max().item()
assert ours.encode(x).abs().max() > 0.1
print(f"{{difference:.1e}}")
assert difference < 1e-4
"""
    loaded = run(code, env=hub.env(tmp_path / "stranger"), cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    head = hub.history("tester/small")[0].sha
    again = run(MAIN, *flags, env=env, cwd=tmp_path)
    assert again.returncode == 0 and "unchanged: " in again.stdout and hub.history("tester/small")[0].sha == head


@pytest.mark.slow
def test_a_dry_run_of_a_sweep_needs_no_hub_and_leaves_the_figure(sweep: Path, tmp_path: Path):
    env = client_env(closed_endpoint(), tmp_path / "hf") | {"COLUMNS": "160"}
    before = {path: path.stat().st_mtime_ns for path in sweep.rglob("*")}
    done = run(MAIN, str(sweep), "--repo", "tester/small", "--dry-run", "-o", "out", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "DRY RUN" in done.stdout and "sae_weights.safetensors" in done.stdout and "cfg.json" in done.stdout
    found = sorted(path.name for path in (tmp_path / "out" / "tester--small").iterdir())
    assert found == ["README.md", "manifest.jsonl", "selection.png"]
    card = (tmp_path / "out" / "tester--small" / "README.md").read_text()
    assert "- Skylion007/openwebtext" in card and "base_model: EleutherAI/pythia-70m" in card
    assert "license_name: research-only" in card and card_errors(card, "model") == ([], [])
    assert {path: path.stat().st_mtime_ns for path in sweep.rglob("*")} == before, "a sweep is only read"
    assert sorted(path.name for path in tmp_path.iterdir()) in (["out"], ["hf", "out"])


def test_members_that_saev_cannot_hold_are_named(sweep: Path, tmp_path: Path):
    repository = choose_members(sweep, "a/b", max_per_layer=6, format="saev", license="mit")
    left = {name: reason for name, reason in repository.gathered.skipped.items() if "topk" in name}
    assert len(left) == 2 and all("cannot hold" in reason for reason in left.values())
    assert {c.activation["architecture"] for c in repository.gathered.candidates} == {"standard"}
    ready = convert_members(repository, sweep, tmp_path, progress=False)
    assert all(c.activation["params"]["key"] == "relu" for c in ready.checkpoints)
    for checkpoint in ready.checkpoints:
        header = json.loads(checkpoint.files[checkpoint.path].read_bytes().split(b"\n")[0])
        trained_by = read_json(sweep / checkpoint.candidate.run_id / "manifest.json")["git_commit"]
        assert header["commit"] == trained_by
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "sae.pt"], "certificates stay here"


def test_a_sweep_that_is_still_training_is_not_published(sweep: Path, tmp_path: Path):
    import shutil

    running = tmp_path / "running"
    shutil.copytree(sweep, running)
    member = next(p for p in running.iterdir() if (p / "manifest.json").is_file())
    (member / "manifest.json").unlink()
    with pytest.raises(
        MechintError, match=rf"1 of 6 members are not finished \({member.name}\); go on with .*--resume"
    ):
        choose_members(running, "a/b", max_per_layer=6, format="saelens", license="mit")


def test_members_without_figures_are_left_out_and_a_sweep_of_none_says_why(sweep: Path, tmp_path: Path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(sweep, broken)
    members = sorted(p for p in broken.iterdir() if (p / "manifest.json").is_file())
    summary = read_json(members[0] / "summary.json")
    del summary["fvu"]
    write_json(members[0] / "summary.json", summary)
    repository = choose_members(broken, "a/b", max_per_layer=6, format="saelens", license="mit")
    assert "fvu is missing" in repository.gathered.skipped[members[0].name]
    for member in members:
        write_json(member / "summary.json", summary)
    with pytest.raises(MechintError, match="no member can be published as saelens"):
        choose_members(broken, "a/b", max_per_layer=6, format="saelens", license="mit")
    with pytest.raises(MechintError, match="is not a sweep"):
        choose_members(tmp_path, "a/b", max_per_layer=6, format="saelens", license="mit")


# --- collections ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_collections_made_filled_and_refused(hub: LoopbackHub, tmp_path: Path):
    hub.add_repo("tester/one", {"a.txt": "a"})
    hub.add_repo("tester/two", {"a.txt": "a"})
    hub.collections[SLUG] = Collection(SLUG, "SAE-V", "tester")
    script = """
from mechint.config.publish_sweep import CollectionSpec
from mechint.errors import MechintError
from mechint.hub.collections import add_to_collection

def add(*repos, **spec):
    try:
        done = add_to_collection(CollectionSpec(**spec), repos)
        print(done.slug.split("/")[0], done.created, ",".join(done.added))
    except MechintError as error:
        print("error:", error)

add("tester/one", title="Things")                             # made
add("tester/one", "tester/two", title="Things")               # found by its title
add("tester/one", slug="tester/sae-v")                        # found without its id
add("tester/two", slug="tester/sae-v-0123456789abcdef01234567")
add("tester/one", slug="tester/sae-w")
add("tester/one", slug="tester/sae-v-ffffffffffffffffffffffff")
add("tester/one", title="T" * 61)
add("tester/one", title="T" * 61, short_title="T")
add("tester/one", title="T" * 61, short_title="T")
add("tester/one", title="T" * 61, short_title="S" * 61)
add("tester/one", title="D", description="d" * 151)
add("tester/none", title="Things")
add("tester/one", title="Theirs", namespace="somebody")
"""
    done = run(script, env=hub.env(tmp_path / "hf", token=hub.token), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[:4] == [
        "tester True tester/one",
        "tester False tester/two",
        "tester False tester/one",
        "tester False tester/two",
    ]
    assert said[4].startswith("error: collection tester/sae-w is not on the Hub; nearest: tester/sae-v")
    assert said[5].startswith("error: collection tester/sae-v-ffffffffffffffffffffffff is not on the Hub")
    assert "(61 characters)" in said[6] and "less than or equal to 60" in said[6] and "are published" in said[6]
    assert said[7:9] == ["tester True tester/one", "tester False "]
    assert f"title {'S' * 61!r} (61 characters)" in said[9]
    assert "at most 150 characters" in said[10]
    assert said[11].startswith("error: ") and "tester/none" in said[11]
    assert said[12].startswith("error: ") and "somebody" in said[12]
    assert [item["id"] for item in hub.collections[SLUG].items] == ["tester/one", "tester/two"]
    assert sorted(c.title for c in hub.collections.values()) == ["SAE-V", "T", "Things"]
    assert hub.token not in done.stdout + done.stderr
