"""A real server on a loopback port, with real workers, for tests.

    with Server(tmp_path, env=hub.env(tmp_path / "hf"), workers=1) as server:
        reply = server.post("/api/v1/saes/hf/preview", {"repo_id": "user/repo"})
        assert reply.status == 200, reply.text

Requests are made by the standard library alone, so that a test decides on every header. What server and workers write
is in `server.log()`.
"""

import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from serving import settings_for
from sqlalchemy import text

from mechint.server.db import Database

SAES = "/api/v1/saes"
_SERVE = """
import os, socket
import uvicorn
from mechint.server.app import create_app
from mechint.server.settings import settings_from

listening = socket.socket(proto=socket.IPPROTO_TCP)
listening.bind(("127.0.0.1", 0))
app = create_app(settings_from())
print(listening.getsockname()[1], flush=True)
os.dup2(2, 1)  # from here on, what is written there belongs into the log
options = dict(server_header=False, ws="websockets-sansio", ws_max_size=65536, timeout_graceful_shutdown=2)
config = uvicorn.Config(app, log_level="debug", **options)  # as `mechint serve`, but with everything logged
uvicorn.Server(config).run(sockets=[listening])
"""


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """The server; start and stop it with `with`.

    Args:
        env: of server and workers, such as a loopback Hub's `env(...)`; MECHINT_* settings are added.
        settings: `{"API_KEY": ...}` becomes MECHINT_API_KEY.
        workers: how many to start with it.
        headers: of each request, where it does not say otherwise.
    """

    def __init__(
        self,
        folder: Path,
        *,
        env: dict[str, str] | None = None,
        settings: dict[str, str] | None = None,
        workers: int = 0,
        headers: dict[str, str] | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.data_dir, self.runs_root = folder / "data", folder / "runs"
        self.runs_root.mkdir(exist_ok=True)
        self.env = {k: v for k, v in (os.environ if env is None else env).items() if not k.startswith("MECHINT_")}
        own = settings_for(folder, runs_root=self.runs_root)
        self.database_url = own.database
        self.env |= own.environment()
        self.env |= {f"MECHINT_{name}": value for name, value in (settings or {}).items()}
        self.env |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.workers, self.headers = workers, headers or {}
        self.log_path = folder / "server.log"
        self.port = 0
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Server":
        log = self._log_file()
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE], env=self.env, stdout=subprocess.PIPE, stderr=log, text=True
        )
        self._processes.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.strip().isdigit():
            self.stop()
            raise AssertionError(f"the server did not start:\n{self.log()}")
        self.port = int(line)
        try:
            wait_until(lambda: self.is_alive(), "the server to answer", self)
            for _ in range(self.workers):
                self.start_worker()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _log_file(self) -> Any:
        return open(self.log_path, "a", encoding="utf-8")  # noqa: SIM115

    def start_worker(self) -> "subprocess.Popen[str]":
        with self._log_file() as log:
            command = [sys.executable, "-m", "mechint.server.worker"]
            process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log, text=True)
        self._processes.append(process)
        return process

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._processes = []

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8")

    def execute(self, statement: str, **values: Any) -> list[Any]:
        """Run SQL on the server's database, behind its back. Returns the rows, if there are any."""
        database = Database(self.database_url)
        try:
            with database.write() as session:
                found = session.execute(text(statement), values)
                return [tuple(row) for row in found] if found.returns_rows else []
        finally:
            database.close()

    def is_alive(self) -> bool:
        with contextlib.suppress(OSError):
            return self.get("/healthz").status == 200
        return False

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 60
    ) -> Reply:
        """One request on a connection of its own. A body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        sent = {**self.headers, **(headers or {})}
        if body is not None and not isinstance(body, bytes):
            body, sent = json.dumps(body).encode(), {"Content-Type": "application/json", **sent}
        try:
            connection.request(method, path, body=body, headers=sent)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, found, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **arguments: Any) -> Reply:
        return self.request("GET", path, **arguments)

    def post(self, path: str, body: Any = None, **arguments: Any) -> Reply:
        return self.request("POST", path, {} if body is None else body, **arguments)

    def delete(self, path: str, **arguments: Any) -> Reply:
        return self.request("DELETE", path, **arguments)

    def sae(self, sae_id: str) -> dict[str, Any]:
        reply = self.get(f"{SAES}/{sae_id}")
        assert reply.status == 200, reply.text
        return reply.json()

    def wait_sae(self, sae_id: str, *, status: str = "ready", seconds: float = 90) -> dict[str, Any]:
        """The SAE once it is ready or in error; fails if that is not what was expected."""
        wait_until(lambda: self.sae(sae_id)["status"] in ("ready", "error"), f"{sae_id} to end", self, seconds)
        found = self.sae(sae_id)
        assert found["status"] == status, f"{found}\n{self.log()[-4000:]}"
        return found

    def wait_job(self, job_id: str, *, state: str = "done", seconds: float = 90) -> dict[str, Any]:
        def job() -> dict[str, Any]:
            return self.get(f"{SAES}/jobs/{job_id}").json()

        wait_until(lambda: job()["state"] in ("done", "error", "cancelled"), f"{job_id} to end", self, seconds)
        found = job()
        assert found["state"] == state, f"{found}\n{self.log()[-4000:]}"
        return found


def wait_until(true: Any, what: str, server: Server | None = None, seconds: float = 60) -> None:
    """Return once `true()` is; fail after `seconds`, which are far more than it takes."""
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            log = server.log()[-4000:] if server is not None else ""
            raise AssertionError(f"waited {seconds} s for {what}\n{log}")
        time.sleep(0.05)
