"""Publishing a bundle to the loopback Hub: what is staged, what goes up, one commit, the check, the dry run."""

import fcntl
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from hub_online import Online
from hypothesis import given
from hypothesis import strategies as st
from loopback_hub import closed_endpoint

from mechint.errors import MechintError
from mechint.hub.bundle import Bundle, StagedFile, stage_dry
from mechint.hub.publish import dry_run, format_size, plan, publish
from mechint.hub.scrub import scrub

pytest_plugins = ["hub_online"]
WEIGHTS = bytes(range(256)) * 400
REPO = "tester/sae-run51-gpt2-medium"


def card(repo_id: str, files: Mapping[str, StagedFile]) -> str:
    rows = "\n".join(f"| {name} | {file.size} | {file.sha256} |" for name, file in files.items())
    return f"---\nlicense: mit\ntags: [sparse-autoencoder]\n---\n# {repo_id}\n\n{rows}\n"


def bundle(folder: Path, **changes: object) -> Bundle:
    """An SAE-like bundle whose files lie in `folder` (made when they are not there)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"sae_weights.safetensors": WEIGHTS, "environment.json": b'{"seed": 0}\n'}.items():
        if not (folder / name).exists():
            (folder / name).write_bytes(content)
    files = {name: folder / name for name in ("sae_weights.safetensors", "environment.json")}
    given = {"kind": "sae", "name": "sae-run51-gpt2-medium", "files": files, "license": "MIT", "card": card}
    return Bundle(**{**given, "metadata": {"run_id": 51}, "roots": (folder,)} | changes)  # type: ignore[arg-type]


def test_one_commit_holds_all_and_tells_every_hash(online: Online, tmp_path: Path) -> None:
    done = publish(bundle(tmp_path / "run"), REPO)
    assert done.changed and done.url == f"{online.hub.endpoint}/{REPO}"
    assert [commit.sha for commit in online.hub.history(REPO)][0] == done.commit
    assert [commit.title for commit in online.hub.history(REPO)] == [
        "Upload sae bundle: sae-run51-gpt2-medium",
        "initial commit",
    ]
    files = online.hub.files(REPO)
    names = {"README.md", "bundle_metadata.json", "sae_weights.safetensors", "environment.json"}
    assert set(files) == names | {".gitattributes"}
    metadata = json.loads(files["bundle_metadata.json"])
    assert (metadata["name"], metadata["kind"], metadata["license"], metadata["run_id"]) == (
        "sae-run51-gpt2-medium",
        "sae",
        "MIT",
        51,
    )
    assert set(metadata["files"]) == names - {"bundle_metadata.json"}
    for name, said in metadata["files"].items():
        assert said == {"sha256": hashlib.sha256(files[name]).hexdigest(), "size": len(files[name])}
    assert hashlib.sha256(WEIGHTS).hexdigest() in files["README.md"].decode()


def test_the_same_content_again_makes_no_commit(online: Online, tmp_path: Path) -> None:
    first = publish(bundle(tmp_path / "run"), REPO)
    puts = len(online.hub.seen("PUT"))
    again = publish(bundle(tmp_path / "run"), REPO)
    assert again == (first.url, first.commit, False)
    copied = publish(bundle(tmp_path / "elsewhere"), REPO)  # the same bytes at another place and time
    assert not copied.changed and len(online.hub.history(REPO)) == 2
    assert len(online.hub.seen("PUT")) == puts and len(online.hub.seen("POST", "/commit/")) == 1


def test_a_changed_bundle_sends_only_what_changed_and_removes_its_own_old_files(online: Online, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = bundle(run)
    publish(Bundle(**{**vars(first), "files": {**first.files, "old/notes.json": b"{}"}}), REPO)
    online.hub.commit(REPO, {"discussion.md": "by somebody else"})
    (run / "environment.json").write_text('{"seed": 1}\n')
    puts = len(online.hub.seen("PUT"))
    done = publish(bundle(run), REPO)
    files = online.hub.files(REPO)
    assert done.changed and files["environment.json"] == b'{"seed": 1}\n'
    assert "old/notes.json" not in files, "an earlier publish put it there, this one has it no more"
    assert files["discussion.md"] == b"by somebody else", "what others put there stays"
    assert len(online.hub.seen("PUT")) == puts, "the weights are there"
    assert len(online.hub.history(REPO)) == 4


def test_private_message_branch_and_no_create(online: Online, tmp_path: Path) -> None:
    with pytest.raises(MechintError, match="is not on the Hub: leave --no-create-repo out"):
        publish(bundle(tmp_path / "run"), REPO, create_repo=False)
    assert not online.hub.repos
    publish(bundle(tmp_path / "run"), "lab/x", private=True, commit_message="First", revision="v2")
    repo = online.hub.repos["model", "lab/x"]
    assert repo.private and repo.at("v2").title == "First" and "README.md" not in repo.at("main").files
    assert not publish(bundle(tmp_path / "run"), "lab/x", create_repo=False, revision="v2").changed


def test_private_is_not_taken_for_public(online: Online, tmp_path: Path) -> None:
    publish(bundle(tmp_path / "run"), REPO)
    (tmp_path / "run" / "environment.json").write_text("{}")
    with pytest.raises(MechintError, match="exists and is public: make it private"):
        publish(bundle(tmp_path / "run"), REPO, private=True)
    assert len(online.hub.history(REPO)) == 2
    publish(bundle(tmp_path / "run"), "tester/secret", private=True)
    (tmp_path / "run" / "environment.json").write_text('{"seed": 3}')
    assert publish(bundle(tmp_path / "run"), "tester/secret").changed
    assert online.hub.repos["model", "tester/secret"].private, "an existing one stays what it is"


def test_the_check_sees_the_staged_files_and_then_those_that_came_back(online: Online, tmp_path: Path) -> None:
    seen: list[tuple[str, bool]] = []

    def check(folder: Path) -> None:
        content = (folder / "layer_3" / "sae_weights.safetensors").read_bytes()
        seen.append((hashlib.sha256(content).hexdigest(), (folder / "environment.json").exists()))

    base = bundle(tmp_path / "run")
    files = {"layer_3/sae_weights.safetensors": base.files["sae_weights.safetensors"], "environment.json": b"{}"}
    name = "layer_3/sae_weights.safetensors"
    publish(bundle(tmp_path / "run", files=files, check=check, check_files=(name,)), REPO)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert seen == [(digest, True), (digest, False)], "once before it goes up, once downloaded: the check files alone"
    assert online.hub.seen("GET", "/storage/"), "it came from the Hub, not from a cache"
    assert not list((online.home / "hub").glob("*")), "nor does it fill the user's cache"


def test_a_check_that_fails_beforehand_publishes_nothing(online: Online, tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        raise MechintError("encode differs")

    with pytest.raises(MechintError, match="encode differs"):
        publish(bundle(tmp_path / "run", check=check), REPO)
    assert not online.hub.repos


def test_other_bytes_on_the_way_back_are_told(online: Online, tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        if "mechint-check-" in str(folder):
            raise MechintError("decode differs by 0.5")

    with pytest.raises(MechintError, match=r"published as commit [0-9a-f]{12}, but the check .* decode differs"):
        publish(bundle(tmp_path / "run", check=check, check_files=("environment.json",)), REPO)


def test_bytes_that_change_on_the_hub_are_noticed(online: Online, tmp_path: Path) -> None:
    gate = online.hub.hold("(HEAD|GET) .*/resolve/.*/environment.json")

    def spoil() -> None:
        gate.wait_for()
        name = hashlib.sha256(b'{"seed": 0}\n').hexdigest()
        online.hub.blobs.path(name).write_bytes(b'{"seed": 9}\n')
        gate.open()

    thread = threading.Thread(target=spoil)
    thread.start()
    with pytest.raises(MechintError, match="environment.json comes back with other bytes than were sent"):
        publish(bundle(tmp_path / "run"), REPO)
    thread.join()


def test_a_gitignore_in_the_repository_cannot_lose_files_unseen(
    online: Online, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(bundle(tmp_path / "run"), REPO)
    sha = online.hub.history(REPO)[0].sha
    from mechint.hub import publish as module

    real = module.tree
    monkeypatch.setattr(
        module,
        "tree",
        lambda *given: {
            name: entry for name, entry in real(*given).items() if given[2] == sha or name != "environment.json"
        },
    )
    (tmp_path / "run" / "environment.json").write_text('{"seed": 2}\n')
    with pytest.raises(MechintError, match="environment.json did not get into it"):
        publish(bundle(tmp_path / "run"), REPO)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x.json", "a/../../x", "a\\b.json", ".git/config", "a//b", "", "a\nb", "./x", "README.md"],
)
def test_names_stay_in_the_repository(tmp_path: Path, name: str) -> None:
    with pytest.raises(MechintError, match=r"cannot be"):
        plan(bundle(tmp_path / "run", files={name: b"{}"}), REPO)


def test_a_file_cannot_also_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(MechintError, match="both a file and a folder"):
        plan(bundle(tmp_path / "run", files={"a": b"{}", "a/b.json": b"{}"}), REPO)


# ---- nothing leaks


def test_paths_and_names_of_the_machine_do_not_go_up(
    online: Online, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import getpass
    import socket

    home = tmp_path / "homes" / "marguerite"
    run = home / "experiments" / "runs" / "a"
    run.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(getpass, "getuser", lambda: "marguerite")
    monkeypatch.setattr(socket, "gethostname", lambda: "gpubox7.lab.example")
    manifest = {
        "path": str(run / "sae" / "cfg.json"),
        "run": str(run),
        "activations": str(home / "acts" / "x.pt"),
        "elsewhere": "/nvme0/marguerite/acts",
        "python": "/usr/bin/python3",
        "host": "gpubox7",
        "user": "marguerite",
        "command": f"train --out {run} on marguerite@gpubox7.lab.example",
        "home": "/home/marguerite/.cache/huggingface",
        "uri": f"file://{run}/metrics.csv",
        "hook": "blocks.3.hook_resid_post",
        "ratio": "a/b/c",
    }
    # the current folder, at a place that no rule knows
    monkeypatch.setattr(Path, "cwd", classmethod(lambda cls: Path("/odd7/project")))
    image = "data:image/png;base64,iVBOR/tmp/aaaa+/home/zz="
    texts = {
        "manifest.json": json.dumps(manifest),
        "report.html": f"<p>{run}/metrics.csv on gpubox7 by marguerite</p><img src='{image}'><a href='/docs/x'>",
        "metrics.csv": f"step,file,from\n1,{run}/a.pt,/nvme0/acts/b.pt\n",
        "settings.yaml": f"out: {run}\nfrom: /nvme0/acts/b.pt\nsee: a/b and /c/d, km/h\n",
        "table.html": '<td>/nvme0/acts/b.pt</td><a href="/nvme0/x/y">of /r/science/top</a></td><p>1/2</p>',
        "paper.md": f"By Marguerite and marguerite. Data in {home}/acts/x.pt, log in `/scratch/marguerite/log.txt`,"
        " see /odd7/project/z.txt, not /odd7/project2.\n",
    }
    for name, text in texts.items():
        (run / name).write_text(text)
    files: dict[str, Path | bytes] = {name: run / name for name in texts}
    metadata = {"result": {"artifacts": [str(run / "sae.safetensors")], "by": "marguerite"}}
    text = lambda repo, files: f"---\nlicense: mit\n---\nMade at {run} on gpubox7.\n"  # noqa: E731
    publish(bundle(tmp_path / "run", files=files, metadata=metadata, roots=(run,), card=text), REPO)
    up = {name: content.decode() for name, content in online.hub.files(REPO).items()}
    for name, content in up.items():
        assert str(tmp_path) not in content and "gpubox7" not in content and "/scratch/" not in content, (name, content)
        assert "marguerite" not in content or name == "paper.md", (name, content)
    said = "Data in ~/acts/x.pt, log in `log.txt`, see z.txt, not /odd7/project2.\n"
    assert up["paper.md"] == f"By Marguerite and marguerite. {said}"
    assert json.loads(up["manifest.json"]) == {
        "path": "sae/cfg.json",
        "run": ".",
        "activations": "~/acts/x.pt",
        "elsewhere": "acts",
        "python": "/usr/bin/python3",
        "host": "host",
        "user": "user",
        "command": "train --out . on user@host",
        "home": "huggingface",
        "uri": "metrics.csv",
        "hook": "blocks.3.hook_resid_post",
        "ratio": "a/b/c",
    }
    assert up["report.html"] == f"<p>metrics.csv on host by user</p><img src='{image}'><a href='/docs/x'>"
    assert up["metrics.csv"] == "step,file,from\n1,a.pt,b.pt\n"
    assert up["settings.yaml"] == "out: .\nfrom: b.pt\nsee: a/b and /c/d, km/h\n"
    assert up["table.html"] == '<td>b.pt</td><a href="/nvme0/x/y">of /r/science/top</a></td><p>1/2</p>'
    assert up["README.md"].endswith("Made at . on host.\n")
    said = json.loads(up["bundle_metadata.json"])
    assert said["result"] == {"artifacts": ["sae.safetensors"], "by": "user"}
    assert said["files"]["manifest.json"]["scrubbed"] and "scrubbed" not in said["files"]["README.md"]
    assert said["files"]["manifest.json"]["sha256"] == hashlib.sha256(up["manifest.json"].encode()).hexdigest()


def test_the_owner_of_the_repository_may_be_called_as_the_user_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import getpass

    monkeypatch.setattr(getpass, "getuser", lambda: "marguerite")
    files: dict[str, Path | bytes] = {"a.json": b'{"repo": "marguerite/sae"}'}
    staged = {repo: stage_dry(bundle(tmp_path / "run", files=files), repo) for repo in ("marguerite/sae", "lab/sae")}
    digests = {repo: found.files["a.json"].sha256 for repo, found in staged.items()}
    assert digests["marguerite/sae"] == hashlib.sha256(files["a.json"]).hexdigest()  # type: ignore[arg-type]
    assert digests["lab/sae"] == hashlib.sha256(b'{"repo": "user/sae"}').hexdigest()


@pytest.mark.parametrize("name", ["notes.json", "paper.md", "weights.bin"])
def test_a_token_in_a_file_is_refused_wherever_it_stands(online: Online, tmp_path: Path, name: str) -> None:
    token = "hf_" + "Ab3" * 11
    (tmp_path / "leaky").mkdir()
    # in binary content across the border of two pieces of the reading
    padding = b"x" * ((1 << 20) - 10) + b" " if name.endswith(".bin") else b'{"a": "'
    (tmp_path / "leaky" / name).write_bytes(padding + token.encode() + b'"}')
    with pytest.raises(MechintError, match=rf"{name} holds an access token") as caught:
        publish(bundle(tmp_path / "run", files={name: tmp_path / "leaky" / name}), REPO)
    assert token not in str(caught.value) and not online.hub.repos


def test_the_token_in_use_is_refused_whatever_it_looks_like(online: Online, tmp_path: Path) -> None:
    content = json.dumps({"env": {"HF_TOKEN": online.hub.token}}).encode()
    with pytest.raises(MechintError, match="the value of HF_TOKEN"):
        publish(bundle(tmp_path / "run", files={"environment.json": content}), REPO)


def test_paths_in_the_metadata_of_weights_are_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2)}, path, metadata={"format": "pt", "source": "/home/someone/run/x.pt"})
    with pytest.raises(MechintError, match=r"its metadata \(source\): save it again"):
        plan(bundle(tmp_path / "run", files={"a.safetensors": path}), REPO)
    save_file({"x": torch.zeros(2)}, path, metadata={"format": "pt", "hook": "blocks.3.hook_resid_post"})
    plan(bundle(tmp_path / "run", files={"a.safetensors": path}), REPO)


def test_a_link_cannot_publish_what_lies_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("password")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").symlink_to(tmp_path / "secret")
    with pytest.raises(MechintError, match="leads out of its folder"):
        plan(bundle(tmp_path / "run", files={"metrics.csv": tmp_path / "run" / "metrics.csv"}), REPO)


# ---- the dry run


def test_the_dry_run_looks_as_documented(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "artifacts" / "run-000051"
    files = {"analysis.json": run / "gone.json", "notes.md": b"hello"}
    planned = bundle(run)
    dry_run(Bundle(**{**vars(planned), "files": {**planned.files, **files}}), REPO)
    shown = capsys.readouterr().out
    lines = [line.rstrip() for line in shown.splitlines()]
    assert re.fullmatch(r"╭─+ mech publish ─+╮", lines[0]), shown
    inside = [line.strip("│ ").rstrip() for line in lines[1:5]]
    assert inside == [
        "DRY RUN — no files uploaded",
        "Bundle: sae-run51-gpt2-medium",
        "Kind:   sae",
        "Target: https://huggingface.co/tester/sae-run51-gpt2-medium",
    ]
    assert "Files that would be uploaded" in lines[6]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")][4:]
    assert cells[0] == ["Staged name", "Source path", "Size"]
    assert [row[0] for row in cells[1:]] == [
        "README.md",
        "bundle_metadata.json",
        "sae_weights.safetensors",
        "environment.json",
        "analysis.json",
        "notes.md",
    ]
    by_name = {row[0]: row[1:] for row in cells[1:]}
    assert by_name["README.md"][0] == by_name["notes.md"][0] == "(generated)"
    assert by_name["sae_weights.safetensors"] == ["artifacts/run-000051/sae_weights.safetensors", "100.0 KB"]
    assert by_name["analysis.json"] == ["missing", ""] and by_name["environment.json"][1] == "12 B"


def test_sizes_read_as_in_the_documentation() -> None:
    assert [format_size(size) for size in (0, 407, 578, 1023, 1024, 3277, 16 << 20, 3 << 30, 5 << 40)] == [
        "0 B",
        "407 B",
        "578 B",
        "1023 B",
        "1.0 KB",
        "3.2 KB",
        "16.0 MB",
        "3.0 GB",
        "5.0 TB",
    ]


def test_the_dry_run_tells_the_sizes_that_go_up_and_needs_nothing(
    online: Online, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = bundle(tmp_path / "run")
    publish(prepared, REPO)
    sizes = {name: len(content) for name, content in online.hub.files(REPO).items()}
    asked = len(online.hub.requests)
    monkeypatch.setenv("HF_ENDPOINT", closed_endpoint())
    monkeypatch.delenv("HF_TOKEN")
    rows = plan(prepared, REPO)
    assert {row.staged_name: row.size for row in rows} == {n: s for n, s in sizes.items() if n != ".gitattributes"}
    dry_run(prepared, REPO)
    assert len(online.hub.requests) == asked


def test_staging_leaves_no_folder(online: Online, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    killed = folder / "mechint-publish-killed"  # no process holds its lock
    (killed / "bundle").mkdir(parents=True)
    (killed / "lock").touch()
    living = folder / "mechint-publish-living"
    living.mkdir()
    with open(living / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        publish(bundle(tmp_path / "run"), REPO)
        assert os.listdir(folder) == [living.name]


@given(
    st.lists(
        st.sampled_from(
            [
                "/x/runs/a",
                "/x/runs/a/sae/cfg.json",
                "/home/bob/k",
                "/nvme/u/v.pt",
                " and ",
                '"',
                ",",
                "<td>",
                "</td>",
                "\n",
            ]
            + ["~", ".", "a/b", "/", "file://", ";base64,QUJD/tmp/x=", "C:\\\\Users\\\\bob\\\\z", "root", "hf_x", ": "]
        ),
        max_size=12,
    ).map("".join),
    st.sampled_from([".json", ".html", ".csv", ".md", ".yaml", ".txt"]),
)
def test_scrubbing_twice_is_scrubbing_once(text: str, suffix: str) -> None:
    """Else the same bundle, pulled and published again, would be another one."""
    once = scrub(text, suffix, roots=[Path("/x/runs/a")])
    assert scrub(once, suffix, roots=[Path("/x/runs/a")]) == once
    plain = re.sub(r";base64,[A-Za-z0-9+/=]+", "", once)
    assert not re.search(r"(?<![\w.:/~<+=-])/(x/runs/a|home/bob)(?![\w.-])", plain), once


@pytest.mark.slow
def test_a_real_run_with_its_report_leaks_nothing(
    online: Online, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report, the manifest and the settings of a run hold its absolute path; what is published does not."""
    import getpass
    import socket

    from hub_material import make_tiny_run

    from mechint.cli import report
    from mechint.hub.sae_bundle import sae_bundle

    home = tmp_path / "nvme7" / "marguerite"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(getpass, "getuser", lambda: "marguerite")
    monkeypatch.setattr(socket, "gethostname", lambda: "gpubox7")
    run = make_tiny_run(home).path
    report.main([str(run)])
    words = [b"marguerite", b"gpubox7", b"nvme7", str(tmp_path).encode()]
    there = [path.name for path in run.rglob("*") if path.is_file() and any(w in path.read_bytes() for w in words)]
    assert {"report.html", "manifest.json", "config.json"} <= set(there), "else this test shows nothing"
    done = publish(sae_bundle(run), REPO)
    files = online.hub.files(REPO)
    assert {"report.html", "figures/training.png", "feature_analysis.json", "sae_weights.safetensors"} <= set(files)
    assert not [(name, word) for name, content in files.items() for word in words if word in content]
    monkeypatch.chdir(run.parent)
    assert publish(sae_bundle(run.name), REPO) == (done.url, done.commit, False), "from elsewhere, the same bytes"
