"""What can go wrong while publishing: each fault leaves the repository as it was, and the message says what to do.

The Hub is the loopback one, the client the real huggingface_hub.
"""

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_online import Online
from loopback_hub import Account, LoopbackHub, closed_endpoint
from loopback_store import Commit
from test_hub_publish import REPO, WEIGHTS, bundle, card

from mechint.errors import MechintError
from mechint.hub.publish import publish
from mechint.huggingface import client

pytest_plugins = ["hub_online"]
ROOT = Path(__file__).resolve().parent.parent
BIG = bytes(range(256)) * 2000  # 512 kB


def state(hub: LoopbackHub) -> dict[str, list[Commit]]:
    """Every repository with its whole history: what a failed publish must not change."""
    return {repo: hub.history(repo) for _, repo in hub.repos}


def refused(hub: LoopbackHub, *words: str, repo: str = REPO, of: Callable[[], object]) -> str:
    """The one-line message of a publish that must fail and change nothing; every word must be in it."""
    before = state(hub)
    with pytest.raises(MechintError) as caught:
        of()
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message and hub.token not in message
    assert state(hub) == before, "a failed publish left something behind"
    return message


# ---- tokens and rights


def test_no_token(online: Online, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    refused(
        online.hub, "not logged in", "`hf auth login`", "settings/tokens", of=lambda: publish(bundle(tmp_path), REPO)
    )
    assert not online.hub.seen("POST")


def test_an_expired_token_in_the_environment(online: Online, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online.hub.accounts["hf_old"] = Account("tester", expired=True)
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    words = ("the token in HF_TOKEN", "expired or revoked", "`hf auth login`", "unset HF_TOKEN")
    assert "hf_old" not in refused(online.hub, *words, of=lambda: publish(bundle(tmp_path), REPO))


def test_an_expired_token_that_was_saved(online: Online, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online.hub.accounts["hf_old"] = Account("tester", expired=True)
    monkeypatch.delenv("HF_TOKEN")
    online.home.mkdir()
    (online.home / "token").write_text("hf_old\n")
    message = refused(
        online.hub, "the saved token", "`hf auth login`", of=lambda: publish(bundle(tmp_path / "run"), REPO)
    )
    assert "HF_TOKEN" not in message


@pytest.mark.parametrize(
    ("account", "words"),
    [
        (Account("alice"), ("belongs to lab", "logged in as alice", "no organisations", "alice/x", "`hf auth login`")),
        (Account("alice", {"other": "write"}), ("belongs to lab", "your organisations: other")),
        (Account("alice", {"lab": "read"}), ("may only read in the organisation lab", "administrators", "alice/x")),
        (Account("alice", {"lab": "write"}, role="read"), ("may only read", "`hf auth login`", "write access")),
        (
            Account("alice", {"lab": "admin"}, role="fineGrained", scopes={"alice": ("repo.write",)}),
            ("no write access to the repositories of lab", "settings/tokens", "`hf auth login`"),
        ),
    ],
)
def test_no_write_access_to_the_organisation(
    online: Online, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: Account, words: tuple[str, ...]
) -> None:
    online.hub.accounts["hf_alice"] = account
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    refused(online.hub, *words, of=lambda: publish(bundle(tmp_path), "lab/x"))
    assert not online.hub.seen("POST"), "known before anything is made or sent"


def test_a_fine_grained_token_with_the_right_publishes(
    online: Online, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scopes = {"lab": ("repo.content.read", "repo.write")}
    online.hub.accounts["hf_alice"] = Account("alice", {"lab": "contributor"}, role="fineGrained", scopes=scopes)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    assert publish(bundle(tmp_path), "lab/x").changed


@pytest.mark.parametrize("where", ["/api/repos/create", "/preupload/", "/info/lfs/", "/commit/"])
def test_rights_that_only_the_hub_knows(online: Online, tmp_path: Path, where: str) -> None:
    online.hub.fail_next(9, 403, match=where, message="resource group: not yours")
    words = ("no write access to lab", "resource group: not yours", "`hf auth login`")
    refused(online.hub, *words, of=lambda: publish(bundle(tmp_path), "lab/x"))


def test_a_repository_of_somebody_else(online: Online, tmp_path: Path) -> None:
    online.hub.add_repo("alice/sae", {"README.md": "mine"})
    words = ("alice/sae belongs to alice", "logged in as tester", "organisations: lab", "publish to tester/sae")
    refused(online.hub, *words, of=lambda: publish(bundle(tmp_path), "alice/sae"))


# ---- names


@pytest.mark.parametrize(
    "name", ["tester/a--b", "tester/has space", "tester/" + "x" * 97, "tester/-x", "noowner", "a/b/c"]
)
def test_a_name_the_hub_never_allows(online: Online, tmp_path: Path, name: str) -> None:
    refused(online.hub, name.split("/")[-1][:20], of=lambda: publish(bundle(tmp_path), name))
    assert not online.hub.requests


def test_a_name_that_only_the_hub_refuses(online: Online, tmp_path: Path) -> None:
    online.hub.refused_names.add("tester/settings")
    refused(online.hub, "status 400", "not allowed", of=lambda: publish(bundle(tmp_path), "tester/settings"))


def test_a_card_the_hub_does_not_accept(online: Online, tmp_path: Path) -> None:
    bad = bundle(tmp_path, card=lambda repo, files: "---\nlicense: research-only\n---\n# x\n")
    words = ("front matter of README.md", '"license" must be one of')
    refused(online.hub, *words, of=lambda: publish(bad, REPO))
    assert not online.hub.seen("PUT"), "before anything large is sent"


# ---- the connection


def test_a_cut_in_the_middle_of_a_part_is_sent_again(online: Online, tmp_path: Path) -> None:
    (tmp_path / "sae_weights.safetensors").write_bytes(BIG)
    online.hub.multipart_chunk = 100_000
    online.hub.fail_next(1, None, match="PUT .*/part/3", reads=30_000)
    assert publish(bundle(tmp_path), REPO).changed
    assert online.hub.files(REPO)["sae_weights.safetensors"] == BIG
    puts = [r.path.rsplit("/", 1)[1] for r in online.hub.seen("PUT")]
    assert puts == ["1", "2", "3", "3", "4", "5", "6"], "only the part that was cut goes again"


@pytest.mark.parametrize("chunk", [None, 100_000])
def test_a_connection_that_stays_cut(online: Online, tmp_path: Path, chunk: int | None) -> None:
    publish(bundle(tmp_path), REPO)
    (tmp_path / "sae_weights.safetensors").write_bytes(BIG)
    online.hub.multipart_chunk = chunk
    online.hub.fail_next(1000, None, match="PUT ", reads=30_000)
    words = ("uploading", "connection broke", "run the same command again")
    refused(online.hub, *words, of=lambda: publish(bundle(tmp_path), REPO))
    online.hub._failures.clear()
    assert publish(bundle(tmp_path), REPO).changed and online.hub.files(REPO)["sae_weights.safetensors"] == BIG


def test_a_new_repository_is_removed_if_the_hub_refuses_the_upload(online: Online, tmp_path: Path) -> None:
    online.hub.fail_next(1, 400, match="/commit/", message="no")
    refused(online.hub, "status 400", of=lambda: publish(bundle(tmp_path), REPO))
    assert online.hub.seen("POST", "/repos/create") and online.hub.seen("DELETE", "/repos/delete")


def test_a_new_repository_in_which_somebody_wrote_is_not_removed(online: Online, tmp_path: Path) -> None:
    gate = online.hub.hold("POST .*/commit/")
    online.hub.fail_next(1, 400, match="/commit/", message="no")

    def write() -> None:
        gate.wait_for()
        online.hub.commit(REPO, {"notes.md": "by a colleague"})
        gate.open()

    colleague = threading.Thread(target=write)
    colleague.start()
    with pytest.raises(MechintError, match="status 400"):
        publish(bundle(tmp_path), REPO)
    colleague.join()
    assert set(online.hub.files(REPO)) == {".gitattributes", "notes.md"}


def test_a_new_branch_is_removed_if_the_hub_refuses_the_upload(online: Online, tmp_path: Path) -> None:
    publish(bundle(tmp_path), REPO)
    (tmp_path / "environment.json").write_text("{}")
    online.hub.fail_next(1, 400, match="/commit/", message="no")
    refused(online.hub, "status 400", of=lambda: publish(bundle(tmp_path), REPO, revision="v2"))
    assert list(online.hub.repos["model", REPO].refs) == ["refs/heads/main"]


def test_what_arrived_in_a_new_repository_is_kept_when_the_connection_breaks(
    online: Online, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    online.hub.fail_next(4, None, match="/commit/")
    with pytest.raises(MechintError, match="run the same command again"):
        publish(bundle(tmp_path), REPO)
    assert set(online.hub.files(REPO)) == {".gitattributes"}
    assert f"hf repo delete {REPO}" in capsys.readouterr().err
    assert publish(bundle(tmp_path), REPO).changed
    assert len(online.hub.seen("PUT")) == 1, "the weights had arrived"


def test_the_hub_out_of_reach(online: Online, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", closed_endpoint())
    refused(online.hub, "cannot be reached", "HF_ENDPOINT", of=lambda: publish(bundle(tmp_path), REPO))


def test_the_hub_fails(online: Online, tmp_path: Path) -> None:
    publish(bundle(tmp_path), REPO)
    (tmp_path / "environment.json").write_text("{}")
    online.hub.fail_next(99, 500, match="/commit/")
    refused(online.hub, "status 500", "try again later", of=lambda: publish(bundle(tmp_path), REPO))
    online.hub._failures.clear()
    online.hub.fail_next(2, 500, match="/commit/")
    assert publish(bundle(tmp_path), REPO).changed, "a failure that passes is waited for"


def test_an_answer_that_was_lost(online: Online, tmp_path: Path) -> None:
    """The commit was made, the connection broke before the answer: asked again, the Hub says 412."""
    publish(bundle(tmp_path), REPO)
    (tmp_path / "environment.json").write_text("{}")
    online.hub.fail_next(1, None, match="/commit/", after_bytes=1)
    done = publish(bundle(tmp_path), REPO)
    assert [r.status for r in online.hub.seen("POST", "/commit/")] == [200, 200, 412]
    assert done.changed and done.commit == online.hub.history(REPO)[0].sha and len(online.hub.history(REPO)) == 3


# ---- rate limits

CALLS = [
    "GET /api/whoami-v2",
    "GET /api/models/[^/]+/[^/]+(/revision/main)?$",
    "POST /api/repos/create",
    "GET .*/tree/",
    "POST /api/validate-yaml",
    "POST .*/preupload/",
    "POST .*/info/lfs/objects/batch",
    "PUT /storage/",
    "POST /api/verify",
    "POST .*/commit/",
    "(HEAD|GET) .*/resolve/",
]


@pytest.mark.parametrize("call", CALLS)
def test_a_rate_limit_is_waited_for(
    online: Online, tmp_path: Path, call: str, capfd: pytest.CaptureFixture[str]
) -> None:
    # the client asks for a file once without and once with patience
    online.hub.fail_next(2 if "resolve" in call else 1, 429, match=call, headers={"Retry-After": "37"})
    assert publish(bundle(tmp_path), REPO).changed
    assert sum(online.slept) == pytest.approx(38, abs=0.01), online.slept
    assert "the Hub's rate limit is reached; going on in 38 s" in capfd.readouterr().err
    statuses = [r.status for r in online.hub.requests if re.search(call, f"{r.method} {r.path}")]
    assert statuses[0] == 429 and len(statuses) > 1 and statuses[-1] in (200, 302)


def test_the_hubs_own_rate_header_counts(online: Online, tmp_path: Path) -> None:
    online.hub.fail_next(2, 429, match="/repos/create", headers={"RateLimit": '"api";r=0;t=120'})
    assert publish(bundle(tmp_path), REPO).changed
    assert sum(online.slept) == pytest.approx(242)


def test_a_rate_limit_without_end(online: Online, tmp_path: Path) -> None:
    online.hub.fail_next(9999, 429, match="/repos/create", headers={"Retry-After": "300"})
    refused(online.hub, "rate limit", "try again later", of=lambda: publish(bundle(tmp_path), REPO))
    assert 3000 < sum(online.slept) <= client.LONGEST_WAIT


# ---- the head moves


def while_committing(hub: LoopbackHub, files: dict[str, str]) -> Callable[[], None]:
    """Somebody commits `files` while the first commit of the publish is under way. Returns what waits for the end."""
    gate = hub.hold("POST .*/commit/")

    def push() -> None:
        gate.wait_for()
        hub.commit(REPO, files)
        gate.open()

    thread = threading.Thread(target=push)
    thread.start()
    return thread.join


def test_the_head_moves_elsewhere(online: Online, tmp_path: Path) -> None:
    publish(bundle(tmp_path), REPO)
    (tmp_path / "environment.json").write_text("{}")
    join = while_committing(online.hub, {"notes.md": "by a colleague"})
    done = publish(bundle(tmp_path), REPO)
    join()
    files = online.hub.files(REPO)
    assert done.changed and files["environment.json"] == b"{}" and files["notes.md"] == b"by a colleague"
    assert [r.status for r in online.hub.seen("POST", "/commit/")] == [200, 412, 200]
    assert online.hub.history(REPO)[0].sha == done.commit and len(online.hub.history(REPO)) == 4


def test_the_head_moves_where_the_bundle_writes(online: Online, tmp_path: Path) -> None:
    publish(bundle(tmp_path), REPO)
    (tmp_path / "environment.json").write_text("{}")
    join = while_committing(online.hub, {"environment.json": '{"theirs": 1}'})
    with pytest.raises(MechintError, match="somebody else's commit changed environment.json .* nothing was published"):
        publish(bundle(tmp_path), REPO)
    join()
    assert online.hub.files(REPO)["environment.json"] == b'{"theirs": 1}' and len(online.hub.history(REPO)) == 3


# ---- staging


def test_the_disk_is_full_while_staging(hub: LoopbackHub, tmp_path: Path) -> None:
    """No file may grow beyond 200 kB; the weights have 512."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "sae_weights.safetensors").write_bytes(BIG)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script(run)],
        env=hub.env(tmp_path / "hf", token=hub.token) | paths() | {"TMPDIR": str(temporary)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "no room to write" in done.stderr and "TMPDIR" in done.stderr and "Traceback" not in done.stderr
    assert not hub.repos and not hub.seen("POST") and os.listdir(temporary) == []


@pytest.mark.parametrize("how", ["rewritten", "grown", "gone"])
def test_a_file_changes_during_staging(online: Online, tmp_path: Path, how: str) -> None:
    """The file that is staged first changes while the card is not yet written: after its copy was made."""
    prepared = bundle(tmp_path)

    class Late(dict[str, Path | bytes]):
        def items(self):  # type: ignore[no-untyped-def]
            for name, source in super().items():
                if name == "environment.json":
                    path = tmp_path / "sae_weights.safetensors"
                    if how == "gone":
                        path.unlink()
                    else:
                        path.write_bytes(WEIGHTS[::-1] if how == "rewritten" else WEIGHTS + b"x")
                yield name, source

    changed = bundle(tmp_path, files=Late(prepared.files))
    refused(online.hub, "sae_weights.safetensors changed while it was staged", of=lambda: publish(changed, REPO))
    assert not online.hub.seen("POST")


def test_a_file_that_is_not_there(online: Online, tmp_path: Path) -> None:
    files = {"sae.safetensors": tmp_path / "gone.safetensors"}
    refused(online.hub, "gone.safetensors is not a file", of=lambda: publish(bundle(tmp_path, files=files), REPO))


def test_a_run_without_its_summary(online: Online, tmp_path: Path) -> None:
    from mechint.hub.sae_bundle import sae_bundle

    run = unfinished(tmp_path)
    (run / "manifest.json").write_text("{}")
    refused(online.hub, "has no summary.json", of=lambda: publish(sae_bundle(run), REPO))
    assert not online.hub.requests


def test_a_run_that_is_still_training(online: Online, tmp_path: Path) -> None:
    from mechint.hub.sae_bundle import sae_bundle

    run = unfinished(tmp_path)
    refused(online.hub, "not finished", "--resume", of=lambda: publish(sae_bundle(run), REPO))
    assert not online.hub.requests


def unfinished(folder: Path) -> Path:
    """A run directory as training leaves it before its end: settings, curve and the state to go on from."""
    from mechint.config import SAETrainConfig

    run = folder / "runs" / "a"
    (run / "state").mkdir(parents=True)
    config = SAETrainConfig(activations_path=str(folder / "acts"), run_name="a")
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    (run / "metrics.csv").write_text("step,loss\n1,2.0\n")
    (run / "state" / "state.pt").write_bytes(b"half")
    return run


# ---- interrupted, and secrets


def script(run: Path, repo: str = REPO) -> str:
    """A program that publishes every file of a folder, and ends like a command: one line and status 2."""
    return textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from mechint.errors import MechintError
        from mechint.hub.bundle import Bundle
        from mechint.hub.publish import publish

        files = {{path.name: path for path in sorted(Path({str(run)!r}).iterdir())}}
        card = lambda repo_id, files: "---\\nlicense: mit\\n---\\n# " + repo_id
        try:
            print(publish(Bundle("sae", "x", files, "MIT", card), {repo!r}))
        except MechintError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        """
    )


def paths() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("chunk", [None, 200_000])
def test_a_killed_upload_goes_on_where_it_was(hub: LoopbackHub, tmp_path: Path, chunk: int | None) -> None:
    hub.multipart_chunk = chunk
    run = tmp_path / "run"
    run.mkdir()
    contents = {f"layer_{i}.safetensors": bytes([i]) + BIG for i in range(8)}
    for name, content in contents.items():
        (run / name).write_bytes(content)
    digests = [hashlib.sha256(content).hexdigest() for content in contents.values()]
    env = hub.env(tmp_path / "hf", token=hub.token) | paths() | {"TMPDIR": str(tmp_path)}
    gate = hub.hold(f"PUT /storage/({'|'.join(digests[3:])})")  # three files pass, every other one stops in its middle
    words = [sys.executable, "-c", script(run)]
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        gate.wait_for(1)
        deadline = time.monotonic() + 60
        while len(hub.seen("POST", "/api/verify")) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
        gate.skip = 10**9  # whatever comes now passes
    assert hub.repos["model", REPO].lfs == set(digests[:3])
    assert set(hub.files(REPO)) == {".gitattributes"}, "no commit, nothing half-done"
    assert [path.name for path in tmp_path.glob("mechint-publish-*")], "kill -9 leaves the staging folder"
    before = len(hub.requests)
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    again = [r.path.split("/")[2] for r in hub.requests[before:] if r.method == "PUT"]
    assert set(again) == set(digests[3:]), "what had arrived is not sent again"
    assert len(again) == 5 * (3 if chunk else 1), "and nothing is sent twice"
    assert "100%" in done.stderr and ".safetensors" in done.stderr, "progress is shown"
    files = hub.files(REPO)
    assert all(files[name] == content for name, content in contents.items()) and len(hub.history(REPO)) == 2
    assert not list(tmp_path.glob("mechint-publish-*")), "the next publish sweeps what the killed one left"
    gate.open()


def test_ctrl_c_leaves_an_existing_repository_as_it_was(
    online: Online, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(bundle(tmp_path), REPO)
    before = state(online.hub)
    (tmp_path / "environment.json").write_text("{}")
    from huggingface_hub import HfApi

    def interrupt(*given: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publish(bundle(tmp_path), REPO)
    assert state(online.hub) == before


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 429, 500])
@pytest.mark.parametrize("where", ["whoami", "/repos/create", "/commit/", "/resolve/"])
def test_a_hub_that_echoes_the_token(
    online: Online,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    status: int,
    where: str,
) -> None:
    """Neither message nor output may hold it, with or without the usual beginning."""
    token = "hf_SecretSecretSecretSecret1" if status % 2 else "oddly-shaped-secret"
    online.hub.accounts[token] = Account("tester")
    monkeypatch.setenv("HF_TOKEN", token)
    headers = {"X-Error-Message": "bad token {token}", "Retry-After": "400"}
    online.hub.fail_next(99, status, match=where, message="Bearer {token} is not welcome", headers=headers)
    with pytest.raises(MechintError) as caught:
        publish(bundle(tmp_path, card=card), REPO)
    said = str(caught.value) + "".join(capfd.readouterr())
    assert token not in said and "SecretSecret" not in said and "Signature" not in said


def test_a_token_given_by_hand_is_not_told(online: Online, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    online.hub.fail_next(9, 400, match="/commit/", message="{token} is not welcome")
    message = refused(
        online.hub, "*** is not welcome", of=lambda: publish(bundle(tmp_path), REPO, token=online.hub.token)
    )
    assert online.hub.token not in message
