"""What must not work: strangers, other sites, other names, large bodies, paths that lead out, tokens that stay."""

import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from live_server import SAES, Server
from loopback_hub import LoopbackHub
from test_server_api import saelens_folder

from mechint.errors import MechintError
from mechint.server.app import create_app
from mechint.server.security import COOKIE, Keys, check_binding, host_names, redact, redact_logs
from mechint.server.settings import Settings

USER, TOKEN = "username", "hf_Zq7RtVwXyPlmKj3"
API_KEY = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    folder = tmp_path_factory.mktemp("hub")
    saelens_folder(folder / "repo" / "layer_6")
    with LoopbackHub(folder, user=USER, token=TOKEN) as found:
        found.add_repo("lab/saes", folder / "repo")
        found.add_repo(f"{USER}/private", folder / "repo", private=True)
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`allowed/` may be imported from; beside it lie files that may not."""
    root = tmp_path_factory.mktemp("files")
    saelens_folder(root / "allowed" / "good")
    saelens_folder(root / "outside")
    (root / "allowed" / "link").symlink_to(root / "outside", target_is_directory=True)
    saelens_folder(root / "allowed" / "half")
    (root / "allowed" / "half" / "sae_weights.safetensors").unlink()
    (root / "allowed" / "half" / "sae_weights.safetensors").symlink_to(root / "outside" / "sae_weights.safetensors")
    return root


@pytest.fixture(scope="module")
def server(hub: LoopbackHub, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    settings = {"IMPORT_ROOTS": str(files / "allowed")}
    with Server(folder, env=hub.env(folder / "hf"), settings=settings, workers=1) as found:
        yield found


@pytest.fixture(scope="module")
def guarded(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an API key."""
    folder = tmp_path_factory.mktemp("guarded")
    with Server(folder, env=hub.env(folder / "hf"), settings={"API_KEY": API_KEY}) as found:
        yield found


# --- strangers --------------------------------------------------------------------------------------------------------


def test_without_the_key_nothing_is_told(guarded: Server):
    for method, path in (
        ("GET", SAES),
        ("GET", f"{SAES}/sae_000000000000"),
        ("POST", f"{SAES}/download"),
        ("DELETE", f"{SAES}/sae_000000000000"),
        ("GET", "/api/v1/openapi.json"),
        ("GET", "/no/such/page"),
        ("GET", "/static/../api/v1/saes"),
        ("GET", "//api/v1/saes"),
    ):
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {API_KEY}"},
            {"X-API-Key": API_KEY[:-1]},
            {"X-API-Key": API_KEY + "\u00e9"},
            {"Cookie": f"{COOKIE}=99999999999.x.y"},
            {"Cookie": f"{COOKIE}={API_KEY}"},
        ):
            reply = guarded.request(method, path, headers=headers)
            assert reply.status in (401, 403, 404), (method, path, headers)
            if reply.status == 404:
                assert path.startswith("/static/")
    reply = guarded.get(SAES)
    assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
    assert reply.json()["code"] == "api_key_needed"
    assert guarded.get(SAES, headers={"Authorization": f"Bearer {API_KEY}"}).status == 200
    assert guarded.get(SAES, headers={"X-API-Key": API_KEY}).status == 200
    assert guarded.get("/healthz").status == 200
    page = guarded.get("/", headers={"Accept": "text/html"})
    assert page.status == 303 and page.headers["location"] == "/login"


def test_a_server_for_others_needs_a_key(tmp_path: Path):
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(MechintError, match="MECHINT_API_KEY"):
            create_app(Settings(data_dir=tmp_path, host=host))
        check_binding(Settings(host=host, api_key=API_KEY))
    with pytest.raises(MechintError, match="16 characters"):
        create_app(Settings(data_dir=tmp_path, api_key="short"))


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch):
    """By `hmac.compare_digest` on digests of one length, whatever was sent."""
    import hmac

    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    keys = Keys(Settings(api_key=API_KEY), b"secret")
    assert keys.is_api_key(API_KEY)
    for given in ("", "c", API_KEY[:-1], API_KEY + "x", "x" * 10_000, "\ud800"):
        assert not keys.is_api_key(given)
    assert len(compared) == 7 and {len(part) for pair in compared for part in pair} == {32}


def test_sessions_are_signed_and_end():
    keys = Keys(Settings(api_key=API_KEY), b"secret")
    cookie = keys.new_session()
    until, nonce, signature = cookie.split(".")
    assert keys.is_session(cookie)
    for forged in (
        "",
        ".",
        "..",
        f"{int(until) + 1}.{nonce}.{signature}",
        f"{until}.{nonce}x.{signature}",
        f"{until}.{nonce}.{signature[:-1]}",
        f"{until}.{nonce}.{'A' * len(signature)}",
    ):
        assert not keys.is_session(forged), forged
    assert not Keys(Settings(api_key=API_KEY), b"other").is_session(cookie)
    assert not Keys(Settings(api_key="another key of the server"), b"secret").is_session(cookie)
    past = f"1000.{nonce}"
    assert not keys.is_session(f"{past}.{keys._sign('session', past)}"), "it has ended"


def test_a_browser_signs_in(guarded: Server):
    assert guarded.get("/api/v1/session").json()["authenticated"] is False
    assert guarded.get("/api/v1/session").json()["csrf_token"] is None
    wrong = guarded.post("/api/v1/session", {"api_key": "wrong"})
    assert wrong.status == 401 and "set-cookie" not in wrong.headers
    own = {"Origin": f"http://127.0.0.1:{guarded.port}"}
    evil = {"Origin": "http://evil.example"}
    assert guarded.post("/api/v1/session", {"api_key": API_KEY}, headers=evil).status == 403
    reply = guarded.post("/api/v1/session", {"api_key": API_KEY}, headers=own)
    assert reply.status == 200
    set_cookie = reply.headers["set-cookie"].lower()
    assert "httponly" in set_cookie and "samesite=strict" in set_cookie
    cookie = reply.headers["set-cookie"].split(";")[0]
    token = reply.json()["csrf_token"]
    assert guarded.get(SAES, headers={"Cookie": cookie}).status == 200
    body = {"sae_ids": ["sae_000000000000"]}
    for headers, status in (
        ({"Cookie": cookie}, 403),
        ({"Cookie": cookie, **own}, 403),
        ({"Cookie": cookie, **own, "X-CSRF-Token": "wrong"}, 403),
        ({"Cookie": cookie, **own, "X-CSRF-Token": token}, 200),
        ({"Cookie": cookie, **evil, "X-CSRF-Token": token}, 403),
        ({"Cookie": f"{COOKIE}=1.2.3", **own, "X-CSRF-Token": token}, 401),
    ):
        assert guarded.post(f"{SAES}/delete", body, headers=headers).status == status, headers
    other = guarded.post("/api/v1/session", {"api_key": API_KEY}, headers=own).headers["set-cookie"].split(";")[0]
    stolen = {"Cookie": other, **own, "X-CSRF-Token": token}
    assert guarded.post(f"{SAES}/delete", body, headers=stolen).status == 403, "the token of another session"


# --- pages of other sites ---------------------------------------------------------------------------------------------


def test_other_names_for_this_machine(server: Server):
    """DNS rebinding: a page of evil.example that has its own name point here is still evil.example."""
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", "", "[::1", "localhost@evil"):
        reply = server.get(SAES, headers={"Host": host})
        assert reply.status in (400, 421), (host, reply.status)
    for host in ("localhost", f"LOCALHOST:{server.port}", "127.0.0.1", "[::1]:80", "localhost."):
        assert server.get(SAES, headers={"Host": host}).status == 200, host
    assert host_names(Settings(host="0.0.0.0", api_key=API_KEY)) is None
    named = host_names(Settings(host="0.0.0.0", api_key=API_KEY, allowed_hosts=("saes.example.org",)))
    assert named is not None and "saes.example.org" in named and "evil.example" not in named


def test_two_host_headers(server: Server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(f"GET {SAES} HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n".encode())
        assert b" 200 " not in connection.recv(4096).split(b"\r\n")[0]


def test_forged_requests(server: Server):
    """State changes that a page of another site could make a browser send, with or without its scripts."""
    own = f"http://127.0.0.1:{server.port}"
    body = {"sae_ids": ["sae_000000000000"]}
    token = server.get("/api/v1/session").json()["csrf_token"]
    good = {"Origin": own, "X-CSRF-Token": token, "Sec-Fetch-Site": "same-origin"}
    assert server.post(f"{SAES}/delete", body, headers=good).status == 200
    assert server.post(f"{SAES}/delete", body).status == 200, "programs that are no browsers"
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{server.port + 1}", "X-CSRF-Token": token},
        {"Origin": f"http://localhost:{server.port}", "X-CSRF-Token": token},
        {"Origin": f"{own}.evil.example", "X-CSRF-Token": token},
        {"Origin": f"http://evil.example@127.0.0.1:{server.port + 1}"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": own, "X-CSRF-Token": token},
        {"Origin": own},
        {"Origin": own, "X-CSRF-Token": token[:-1] + ("A" if token[-1] != "A" else "B")},
        {"Origin": own, "X-CSRF-Token": "\u00ff"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Cookie": "anything=1", "Origin": own},
    ):
        for method, path in (("POST", f"{SAES}/delete"), ("DELETE", f"{SAES}/sae_000000000000"), ("PUT", SAES)):
            assert server.request(method, path, body, headers=headers).status == 403, (method, headers)
    # a form of another site has no Origin in old browsers, but cannot send JSON
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        reply = server.request("POST", f"{SAES}/delete", json.dumps(body).encode(), headers={"Content-Type": kind})
        assert reply.status in (400, 415, 422), kind


def test_no_other_site_may_read_or_frame(server: Server):
    for path in (SAES, "/healthz", "/no/such", f"{SAES}/sae_000000000000", "/api/v1/openapi.json"):
        reply = server.get(path, headers={"Origin": "http://evil.example"})
        assert not any(name.startswith("access-control-") for name in reply.headers), path
        assert reply.headers["x-frame-options"] == "DENY" and reply.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"
        assert reply.headers["cache-control"] == "no-store"
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "DELETE"}
    preflight = server.request("OPTIONS", f"{SAES}/sae_000000000000", headers=asked)
    assert not any(name.startswith("access-control-") for name in preflight.headers)
    refused = server.get(SAES, headers={"Host": "evil.example"})
    assert refused.headers["x-content-type-options"] == "nosniff"


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_large_bodies_are_not_read(server: Server):
    reply = server.post(f"{SAES}/hf/preview", {"repo_id": "a/b", "x": "y" * (2 << 20)})
    assert reply.status == 413 and reply.json()["code"] == "too_large"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        head = f"POST {SAES}/hf/preview HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        answer = b""
        try:
            for _ in range(200):
                connection.sendall(chunk)
            answer = connection.recv(4096)
        except ConnectionError:  # it hung up on us, perhaps before its answer was read
            answer = answer or b"HTTP/1.1 413 "
        assert b" 413 " in answer.split(b"\r\n")[0]
    for body in (b"[" * 500_000, b'{"repo_id": ' + b"[" * 200_000, b"\xff\xfe", b"{", b""):
        reply = server.request("POST", f"{SAES}/hf/preview", body, headers={"Content-Type": "application/json"})
        assert reply.status in (400, 422), reply.text[:200]
    assert server.is_alive()


# --- paths ------------------------------------------------------------------------------------------------------------


def test_imports_stay_in_the_folders_that_are_allowed(server: Server, files: Path):
    allowed = files / "allowed"
    for path in (
        files / "outside",
        allowed / ".." / "outside",
        f"{allowed}/good/../../outside",
        allowed / "link",
        allowed / "link" / "sae_weights.safetensors",
        "/etc/passwd",
        "/proc/self/environ",
        "/",
        "..",
        "good",
        "~/x",
        "file:///etc/passwd",
        str(files / "allowed") + "-not",
        server.data_dir / "mechint.db",
        server.data_dir / "secret.key",
    ):
        reply = server.post(f"{SAES}/import/file", {"file_path": str(path), "name": "x"})
        assert reply.status == 400, (path, reply.text)
        assert reply.json()["code"] == "file_not_found" and "PRIVATE" not in reply.text
    assert server.post(f"{SAES}/import/file", {"file_path": f"{allowed}/good\0", "name": "x"}).status == 422
    # a file inside the folder that is a link to one outside of it
    reply = server.post(f"{SAES}/import/file", {"file_path": str(allowed / "half"), "name": "x"})
    if reply.status == 202:
        found = server.wait_sae(reply.json()["id"], status="error")
        assert not (server.data_dir / "saes" / found["id"]).exists()
    else:
        assert reply.status == 400
    good = server.post(f"{SAES}/import/file", {"file_path": str(allowed / "good"), "name": "x"})
    assert good.status == 202 and server.wait_sae(good.json()["id"])


def test_training_names_stay_below_the_runs_folder(server: Server, files: Path):
    (server.runs_root / "linked").unlink(missing_ok=True)
    (server.runs_root / "linked").symlink_to(files, target_is_directory=True)
    for name in ("..", "../files", "/etc", ".", "linked", "linked/allowed", "a/../..", "~", "x\\..\\y", "nul\u0000l"):
        reply = server.post(f"{SAES}/import/training", {"training_id": name})
        assert reply.status in (400, 404, 422), (name, reply.text)
    for name in ("..", "%2e%2e", "..%2f..%2fetc", "linked", "%00"):
        assert server.get(f"{SAES}/training/{name}/available").status == 404, name


def test_paths_of_repositories_stay_in_them(server: Server):
    for path in ("../layer_6", "a/../../b", "/layer_6", "layer_6\\..\\x", "..", "a/..", "x\u0000"):
        for where, more in (("download", {}), ("upload", {"sae_id": "sae_000000000000"})):
            reply = server.post(f"{SAES}/{where}", {"repo_id": "lab/saes", "filepath": path, **more})
            assert reply.status in (400, 422), (where, path, reply.text)


def test_deleting_removes_the_files_of_that_sae_only(server: Server, tmp_path: Path):
    """Whatever its row says of where they are."""
    reply = server.post(f"{SAES}/download", {"repo_id": "lab/saes", "filepath": "layer_6"})
    sae_id = server.wait_sae(reply.json()["id"])["id"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    server.execute("UPDATE saes SET local_path = :path WHERE id = :id", path=str(precious), id=sae_id)
    assert server.delete(f"{SAES}/{sae_id}").status == 200
    assert (precious / "file").read_text() == "mine"
    assert not (server.data_dir / "saes" / sae_id).exists()


def test_reports_are_contained_and_can_do_nothing(server: Server, files: Path):
    """A run directory may come from anyone: its page is served without any right, and only if it lies there itself."""
    run = server.runs_root / "shown"
    run.mkdir()
    (run / "config.json").write_text("{}")
    reply = server.post(f"{SAES}/import/file", {"file_path": str(files / "allowed" / "good"), "name": "x"})
    sae_id = server.wait_sae(reply.json()["id"])["id"]

    def of_run(training_id: str) -> Any:
        server.execute("UPDATE saes SET training_id = :run WHERE id = :id", run=training_id, id=sae_id)
        return server.get(f"{SAES}/{sae_id}/report")

    assert of_run("shown").status == 404
    (run / "report.html").write_text("<script>fetch('/api/v1/saes')</script>")
    reply = of_run("shown")
    assert reply.status == 200 and reply.text.startswith("<script>")
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts;") and "allow-same-origin" not in policy
    assert "default-src 'none'" in policy and "connect-src" not in policy and "form-action 'none'" in policy
    assert reply.headers["content-type"].startswith("text/html")
    for elsewhere in ("../shown", "/etc", "..", "", ".", f"../{server.runs_root.name}/shown/../..", str(files)):
        assert of_run(elsewhere).status == 404, elsewhere
    (run / "report.html").unlink()
    (run / "report.html").symlink_to(files / "outside" / "cfg.json")
    assert of_run("shown").status == 404
    (server.runs_root / "away").symlink_to(files, target_is_directory=True)
    (files / "config.json").write_text("{}")
    (files / "report.html").write_text("outside")
    assert of_run("away").status == 404


# --- tokens -----------------------------------------------------------------------------------------------------------


def everything_in(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()


def test_tokens_are_not_kept_told_or_logged(server: Server, hub: LoopbackHub):
    """Through every request that takes one, its errors included; then every file and every answer is searched."""
    answers = []
    secret = TOKEN.encode()

    def ask(path: str, body: Any, **arguments: Any) -> Any:
        reply = server.post(f"{SAES}/{path}", body, **arguments)
        answers.append(reply)
        return reply

    assert ask("hf/preview", {"repo_id": f"{USER}/private", "access_token": TOKEN}).status == 200
    assert ask("hf/preview", {"repo_id": "nobody", "access_token": TOKEN}).status == 422
    assert ask("hf/preview", {"repo_id": "no/such", "access_token": TOKEN}).status == 404
    assert ask("hf/preview", {"repo_id": "a/b", "access_token": [TOKEN]}).status == 422
    assert ask("hf/preview", {"repo_id": "a/b", "access_token": {"x": TOKEN}}).status == 422
    assert ask("hf/preview", {"repo_id": "a/b", "access_token": f"{TOKEN} {TOKEN}"}).status == 422
    assert ask("hf/preview", {"repo_id": "a/b", "access_token": TOKEN * 100}).status == 422
    assert ask("hf/preview", f'{{"repo_id": "a/b", "access_token": "{TOKEN}'.encode()).status == 422
    assert ask("hf/preview", [TOKEN]).status == 422
    hub.fail_next(1, 500, match="GET /api/models")
    assert ask("hf/preview", {"repo_id": "lab/saes", "access_token": TOKEN}).status == 502
    assert ask(f"model-hint?d_model=768&access_token={TOKEN}", {}).status in (404, 405)
    answers.append(server.get(f"{SAES}?access_token={TOKEN}&status=wrong"))
    private = {"repo_id": f"{USER}/private", "filepath": "layer_6", "access_token": TOKEN}
    waiting = ask("download", private)
    assert waiting.status == 202
    found = server.wait_sae(waiting.json()["id"])
    upload = {"sae_id": found["id"], "repo_id": f"{USER}/kept", "filepath": "a", "create_repo": True}
    job = ask("upload", upload | {"access_token": TOKEN})
    server.wait_job(job.json()["job_id"])
    assert "a/cfg.json" in hub.files(f"{USER}/kept"), "it was used all the same"
    failing = ask("upload", upload | {"access_token": TOKEN, "repo_id": "other/kept"})
    error = server.wait_job(failing.json()["job_id"], state="error")
    answers += [server.get(f"{SAES}/jobs"), server.get(SAES), server.get(f"{SAES}/{found['id']}")]
    for reply in answers:
        assert secret not in reply.body and not any(TOKEN in value for value in reply.headers.values())
        assert b"cipher" not in reply.body
    assert TOKEN not in json.dumps(error)
    assert TOKEN not in server.log(), "neither the request lines nor the workers' messages have it"
    assert "access_token=***" in server.log(), "the request line is there, though"
    for path, data in everything_in(server.data_dir):
        assert secret not in data, path
    assert server.execute("SELECT count(*) FROM jobs WHERE token_cipher IS NOT NULL") == [(0,)], "it is over"
    for name, data in hub.files(f"{USER}/kept").items():
        assert secret not in data, name


def test_one_users_token_does_nothing_for_another(server: Server, hub: LoopbackHub):
    """Neither while a request with it runs, nor afterwards from any cache."""
    body = {"repo_id": f"{USER}/private"}
    assert server.post(f"{SAES}/hf/preview", body | {"access_token": TOKEN}).status == 200
    assert server.post(f"{SAES}/hf/preview", body).status == 404
    reply = server.post(f"{SAES}/download", {**body, "filepath": "layer_6", "access_token": TOKEN})
    server.wait_sae(reply.json()["id"])
    reply = server.post(f"{SAES}/download", {**body, "filepath": "layer_6"})
    found = server.wait_sae(reply.json()["id"], status="error")
    assert "Repository not found" in found["error_message"]
    asked = [r for r in hub.seen("GET") if r.headers.get("authorization") not in (None, f"Bearer {TOKEN}")]
    assert not asked


@pytest.mark.slow
def test_the_servers_own_token_is_for_its_own_user(hub: LoopbackHub, tmp_path: Path):
    """With HF_TOKEN set: used for requests without one where the client is that user, not where others may ask."""
    env = hub.env(tmp_path / "hf", token=TOKEN)
    body = {"repo_id": f"{USER}/private"}
    with Server(tmp_path / "own", env=env) as own:
        assert own.post(f"{SAES}/hf/preview", body).status == 200
    shared = {"API_KEY": API_KEY, "SHARE_HUB_TOKEN": "0"}
    with Server(tmp_path / "shared", env=env, settings=shared, headers={"X-API-Key": API_KEY}) as others:
        assert others.post(f"{SAES}/hf/preview", body).status == 404
        assert others.post(f"{SAES}/hf/preview", body | {"access_token": TOKEN}).status == 200
    assert not Settings(host="0.0.0.0", api_key=API_KEY).uses_server_token


def test_the_key_file_is_private(server: Server):
    assert os.stat(server.data_dir / "secret.key").st_mode & 0o077 == 0


def test_logs_are_redacted_whatever_writes_them(caplog: pytest.LogCaptureFixture):
    made = logging.getLogRecordFactory()
    try:
        redact_logs()
        redact_logs()
        log = logging.getLogger("somebody.else")
        with caplog.at_level(logging.INFO):
            log.info("GET %s", f"/x?access_token={TOKEN}&limit=3")
            log.info("headers: %s", {"authorization": f"Bearer {API_KEY}"})
            log.info(f"token={TOKEN}")
            log.info("%(what)s %(n)d", {"what": f"using {TOKEN}", "n": 3})
            try:
                raise ValueError(f"bad token {TOKEN}")
            except ValueError:
                log.exception("failed")
        text = "\n".join(logging.Formatter("%(message)s").format(record) for record in caplog.records)
        assert TOKEN not in text and API_KEY not in text
        assert "limit=3" in text and "ValueError" in text and "*** 3" in text
    finally:
        logging.setLogRecordFactory(made)
    assert redact("hf_hub_download of model_token_ids: 3 tokens") == "hf_hub_download of model_token_ids: 3 tokens"
    assert re.fullmatch(r"a=\*\*\*", redact("a=hf_abcdefgh"))
