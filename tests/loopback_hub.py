"""A Hugging Face Hub on 127.0.0.1, for tests: the real client libraries talk to it unmodified.

    with LoopbackHub(tmp_path) as hub:
        sha = hub.add_repo("EleutherAI/pythia-70m", folder)                       # returns the commit
        hub.add_repo("Skylion007/openwebtext", {"data/train-0.parquet": data}, type="dataset")
        subprocess.run([sys.executable, "-c", script], env=hub.env(tmp_path / "hf"))
        assert hub.seen("GET", r"/resolve/")

The client reads its endpoint when it is imported, so a test runs it in a subprocess with `hub.env(...)`. Every
request that subprocess makes to anywhere else goes to this server as to a proxy, is refused at once and shows up in
`hub.seen("OUTSIDE")`: tests neither leave the machine nor wait for name look-ups.

Small files are answered directly; LFS files (weights, parquet) are redirected to a second port, as the real Hub
redirects to its storage host, because the client treats another origin differently (metadata come from the redirect,
the token is not sent along).
"""

import contextlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import loopback_collections  # noqa: F401  (registers its routes)
from loopback_api import Reply, Request, answer
from loopback_store import REPO_TYPES, BlobStore, Commit, Files, HubError, Repo

CLIENT_VARIABLES = (
    "HF_",
    "HUGGING",
    "TRANSFORMERS_",
    "DATASETS_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
)
DEFAULT_TOKEN = "hf_loopback"


class Failure(NamedTuple):
    status: int | None
    pattern: str
    after_bytes: int
    headers: dict[str, str]
    reads: int | None = None
    message: str | None = None


@dataclass(frozen=True)
class Account:
    """Who a token belongs to and what it may do."""

    user: str
    orgs: Mapping[str, str] = field(default_factory=dict)  # name -> "admin", "write", "contributor" or "read"
    role: str = "write"  # of the token: "write", "read" or "fineGrained"
    scopes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of a fine-grained one: owner -> its rights
    expired: bool = False

    def may_read(self, owner: str) -> bool:
        return owner == self.user or owner in self.orgs

    def may_write(self, owner: str) -> bool:
        if self.role == "fineGrained" and "repo.write" not in self.scopes.get(owner, ()):
            return False
        if self.role == "read":
            return False
        return owner == self.user or self.orgs.get(owner) in ("admin", "write", "contributor")


class Gate:
    """Requests that wait: `reached` counts up as they come, `open()` lets them go on."""

    def __init__(self, pattern: str, skip: int) -> None:
        self.pattern, self.skip = pattern, skip
        self.reached, self._opened = threading.Semaphore(0), threading.Event()

    def wait_for(self, n: int = 1, timeout: float = 60) -> None:
        """Return when `n` more requests stand at the gate."""
        for _ in range(n):
            assert self.reached.acquire(timeout=timeout), f"no request {self.pattern} came"

    def open(self) -> None:
        self._opened.set()

    def stand(self) -> None:
        self.reached.release()
        assert self._opened.wait(300), "a gate was never opened"


def client_env(
    endpoint: str, hf_home: Path | str, *, token: str | None = None, offline: bool = False
) -> dict[str, str]:
    """This process's environment with every variable of the Hub clients replaced, for `subprocess.run(env=...)`."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(CLIENT_VARIABLES)}
    ours = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(hf_home),
        "HF_HUB_DISABLE_XET": "1",  # with hf_xet installed the client would upload by a protocol of its own
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # `datasets` would report each load_dataset to a counter on the network
        "HTTP_PROXY": endpoint,
        "HTTPS_PROXY": endpoint,
        "NO_PROXY": "127.0.0.1",
    }
    ours |= {name.lower(): ours[name] for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")}
    if token is not None:
        ours["HF_TOKEN"] = token
    if offline:
        ours["HF_HUB_OFFLINE"] = "1"
    return kept | ours


def closed_endpoint() -> str:
    """An address on this machine where nothing listens: connections are refused at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


class LoopbackHub:
    """The server; start and stop it with `with`. `user` owns `token` and may write to its own repositories
    and to those of `orgs`."""

    def __init__(self, folder: Path, *, user: str = "tester", orgs: tuple[str, ...] = (), token: str = DEFAULT_TOKEN):
        self.user, self.orgs, self.token = user, orgs, token
        self.blobs = BlobStore(Path(folder) / "hub_blobs")
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.page_size = 1000  # entries of a tree listing before the client must ask for the next page
        self.multipart_chunk: int | None = None  # bytes; when set, larger LFS uploads must come in parts
        self.parts: dict[str, dict[int, bytes]] = {}  # sha256 -> the parts of an upload that is not finished
        self.collections: dict[str, Any] = {}  # slug -> loopback_collections.Collection
        self.accounts: dict[str, Account] = {}  # further tokens -> whose they are
        self.refused_names: set[str] = set()  # owner/name that the Hub will not have, though its form is right
        self.bytes_per_second: list[tuple[str, float]] = []  # (regex on "METHOD /path", speed of its body)
        self.lock = threading.RLock()
        self._failures: list[Failure] = []
        self._gates: list[Gate] = []
        self._servers: list[_Server] = []

    def __enter__(self) -> "LoopbackHub":
        self._servers = [_Server(self), _Server(self)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the ports and every open connection, as an outage would."""
        for gate in self._gates:
            gate.open()
        for server in self._servers:
            server.shutdown()
            server.server_close()
            server.drop_connections()
        self._servers = []

    def env(self, hf_home: Path | str, *, token: str | None = None, offline: bool = False) -> dict[str, str]:
        """The complete environment for a subprocess that uses this hub, with an empty or shared cache `hf_home`."""
        return client_env(self.endpoint, hf_home, token=token, offline=offline)

    def add_repo(
        self, repo_id: str, files: Files, *, type: str = "model", private: bool = False, gated: bool = False
    ) -> str:
        """Publish a folder, or {path: bytes | text | local Path}, as the first commit of `main`. Returns its sha."""
        assert type in REPO_TYPES and (type, repo_id) not in self.repos, f"{type} {repo_id}: unknown type or duplicate"
        repo = Repo(repo_id, type, private, gated)
        sha = repo.commit(self.blobs.blobs(files), title="initial commit").sha
        self.repos[type, repo_id] = repo
        return sha

    def commit(
        self, repo_id: str, files: Files, *, type: str = "model", branch: str = "main", deleted: tuple[str, ...] = ()
    ) -> str:
        """Add or replace files in one more commit, as somebody else's push would. Returns its sha."""
        with self.lock:
            return self.repos[type, repo_id].commit(self.blobs.blobs(files), deleted=deleted, branch=branch).sha

    def tag(self, repo_id: str, name: str, revision: str = "main", *, type: str = "model") -> None:
        repo = self.repos[type, repo_id]
        repo.refs[f"refs/tags/{name}"] = repo.at(revision).sha

    def files(self, repo_id: str, revision: str = "main", *, type: str = "model") -> dict[str, bytes]:
        """What the repository holds at a revision, for checking an upload."""
        commit = self.repos[type, repo_id].at(revision)
        return {path: self.blobs.path(blob.sha256).read_bytes() for path, blob in sorted(commit.files.items())}

    def history(self, repo_id: str, revision: str = "main", *, type: str = "model") -> list[Commit]:
        """Commits of a revision, newest first."""
        return self.repos[type, repo_id].history(revision)

    def fail_next(
        self,
        n: int,
        status: int | None = 503,
        *,
        match: str = "",
        after_bytes: int = 0,
        headers: dict[str, str] | None = None,
        reads: int | None = None,
        message: str | None = None,
    ) -> None:
        """Answer the next `n` requests whose "METHOD /path" matches the regex `match` with `status`. With
        `status=None` the connection is cut: after `reads` bytes of the request's body if that is given, else after
        `after_bytes` of the true answer (0: before any answer). In `message` and `headers`, {token} becomes what the
        client sent as its token, as by a server that tells too much."""
        with self.lock:
            self._failures += [Failure(status, match, after_bytes, headers or {}, reads, message)] * n

    def hold(self, match: str, *, skip: int = 0) -> Gate:
        """Let requests that match wait in the middle of their body until the gate is opened; the first `skip` pass."""
        gate = Gate(match, skip)
        with self.lock:
            self._gates.append(gate)
        return gate

    def seen(self, method: str = "", pattern: str = "") -> list[Request]:
        """The requests so far of one method ("OUTSIDE": refused ones) whose path matches a regex."""
        return [r for r in list(self.requests) if method in ("", r.method) and re.search(pattern, r.path)]

    def take_failure(self, request: Request) -> Failure | None:
        with self.lock:
            for i, failure in enumerate(self._failures):
                if re.search(failure.pattern, f"{request.method} {request.path}"):
                    return self._failures.pop(i)
        return None

    def gate_for(self, request: Request) -> Gate | None:
        with self.lock:
            for gate in self._gates:
                if re.search(gate.pattern, f"{request.method} {request.path}"):
                    gate.skip -= 1
                    if gate.skip < 0:
                        return gate
        return None

    def caller(self, request: Request) -> Account | None:
        """Whose token came with the request; None without one. One that is unknown or expired is refused."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        mine = Account(self.user, dict.fromkeys(self.orgs, "write"))
        account = mine if token == self.token else self.accounts.get(token)
        if account is None or account.expired:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return account

    def repo(self, request: Request, type: str, repo_id: str, *, write: bool = False, files: bool = False) -> Repo:
        """The repository, if it exists and the request may read (or write) it. Like the Hub, a private one that may
        not be read looks missing, and a missing one answers 401 to strangers."""
        caller = self.caller(request)
        owner = repo_id.split("/")[0]
        repo = self.repos.get((type, repo_id))
        member = caller is not None and caller.may_read(owner)
        if repo is None or (repo.private and not member):
            if caller is not None:
                raise HubError(404, "RepoNotFound", "Repository not found")
            raise HubError(401, "RepoNotFound", "Invalid username or password.")
        if write and caller is None:
            raise HubError(401, None, "Invalid username or password.")
        if write and not (caller is not None and caller.may_write(owner)):
            raise HubError(403, None, f"You don't have the rights to write to {repo_id}")
        if files and repo.gated and not member:
            raise HubError(403 if caller else 401, "GatedRepo", f"Access to {type} {repo_id} is restricted.")
        return repo


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: LoopbackHub) -> None:
        self.hub = hub
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # already closed by its own thread
                connection.shutdown(socket.SHUT_RDWR)
        self.connections.clear()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is its own business; anything else is a bug in this file and must be seen."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def injected(failure: Failure, request: Request) -> Reply:
    """The answer of a failure on demand; {token} in its texts becomes the token of the request."""
    assert failure.status is not None
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    message = (failure.message or f"injected {failure.status}").replace("{token}", token)
    headers = {name: value.replace("{token}", token) for name, value in failure.headers.items()}
    return Reply({"error": message}, failure.status, headers)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else keep-alive replies wait 40 ms for a delayed acknowledgement
    server: _Server

    def handle_any(self) -> None:
        hub = self.server.hub
        url = urlsplit(self.path)
        outside = self.command == "CONNECT" or bool(url.netloc)
        request = Request(
            "OUTSIDE" if outside else self.command,
            self.path if outside else unquote(url.path),
            {name: values[-1] for name, values in parse_qs(url.query).items()},
            {name.lower(): value for name, value in self.headers.items()},
            int(self.headers.get("Content-Length") or 0),
        )
        failure = hub.take_failure(request)
        cut = failure if failure is not None and failure.status is None else None
        if cut is not None and cut.reads is not None:
            self.rfile.read(min(cut.reads, request.size))
            hub.requests.append(request)
            self.hang_up()
            return
        body = self.read_body(request)
        request = request._replace(size=len(body), body=body)
        if cut is not None and cut.after_bytes == 0:
            hub.requests.append(request._replace(body=b""))
            self.hang_up()
            return
        try:
            if outside:
                reply = Reply(
                    {"error": "only the loopback hub can be reached"}, 502 if self.command == "CONNECT" else 404
                )
            elif failure is not None and failure.status is not None:
                reply = injected(failure, request)
            else:
                reply = answer(hub, request, url.path)
        except HubError as error:
            reply = Reply(error.body, error.status, error.headers)
        hub.requests.append(request._replace(status=reply.status, body=b""))
        self.send(reply, request, cut=None if cut is None else cut.after_bytes)

    def hang_up(self) -> None:
        """Close the connection at once; what the client still sends is answered with a reset."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = handle_any

    def read_body(self, request: Request) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            gate = self.server.hub.gate_for(request)
            body = self.slowly(request, self.rfile.read, request.size // 2)
            if gate is not None:
                gate.stand()
            return body + self.slowly(request, self.rfile.read, request.size - len(body))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def slowly(self, request: Request, read: Callable[[int], bytes], size: int) -> bytes:
        speed = self.speed(request)
        if speed is None:
            return read(size)
        pieces = []
        for start in range(0, size, 1 << 16):
            pieces.append(read(min(1 << 16, size - start)))
            time.sleep(len(pieces[-1]) / speed)
        return b"".join(pieces)

    def speed(self, request: Request) -> float | None:
        line = f"{request.method} {request.path}"
        return next((speed for pattern, speed in self.server.hub.bytes_per_second if re.search(pattern, line)), None)

    def send(self, reply: Reply, request: Request, cut: int | None) -> None:
        is_json = not isinstance(reply.body, bytes)
        body = json.dumps(reply.body).encode() if not isinstance(reply.body, bytes) else reply.body
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json" if is_json else "application/octet-stream"}
        headers |= {"Content-Length": str(len(body))} | reply.headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            shown = body if cut is None else body[:cut]
            speed = self.speed(request)
            for start in range(0, len(shown), 1 << 16 if speed else max(1, len(shown))):
                piece = shown[start : start + (1 << 16)] if speed else shown
                self.wfile.write(piece)
                if speed:
                    time.sleep(len(piece) / speed)
        if cut is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass  # `hub.requests` is the log
