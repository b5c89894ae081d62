"""A service for tests: settings in a temporary folder, worker and server processes, a Hub that can be slow."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from loopback_hub import LoopbackHub, _Handler
from safetensors.torch import load, save

ROOT = Path(__file__).resolve().parent.parent
SERVE = "import sys; from mechint.cli.serve import main; sys.exit(main(sys.argv[1:]))"


# Where these are set, the tests run on PostgreSQL and Redis: an address of a database server without a database's name
# (postgresql://user@host:port), and of a Redis server (redis://host:port), both for tests alone.
DATABASE, BROKER = "MECHINT_TEST_DATABASE_URL", "MECHINT_TEST_BROKER_URL"
_number = itertools.count(int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) * 5)


def settings_for(folder: Path, **more: Any) -> Any:
    """Settings of a service of its own: a data folder in `folder`, and a fresh database."""
    from mechint.server.settings import Settings

    if server := os.environ.get(DATABASE):
        from sqlalchemy import create_engine, text

        name = f"mechint_{os.getpid()}_{next(_number)}"
        engine = create_engine(
            f"{server.replace('postgresql:', 'postgresql+psycopg:')}/postgres", isolation_level="AUTOCOMMIT"
        )
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        more["database_url"] = f"{server}/{name}"
    if server := os.environ.get(BROKER):
        more["broker_url"] = f"{server}/{next(_number) % 16}"
    return Settings(data_dir=folder / "data", **more)


def sae_files(d_in: int = 64, d_sae: int = 256, *, seed: int = 0, **changes: Any) -> dict[str, bytes]:
    """cfg.json and sae_weights.safetensors of a random SAE in SAELens's layout; `changes` go into its metadata."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "W_enc": torch.randn(d_in, d_sae, generator=generator) / d_in**0.5,
        "W_dec": torch.randn(d_sae, d_in, generator=generator) / d_in**0.5,
        "b_enc": -torch.rand(d_sae, generator=generator),
        "b_dec": torch.randn(d_in, generator=generator),
    }
    metadata = {"sae_lens_version": "6.0.0", "hook_name": "blocks.6.hook_resid_pre", "prepend_bos": True, **changes}
    cfg = {
        "architecture": "standard",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": metadata,
    }
    # with a note in its header: the same weights written by us are other bytes, so that an upload has to send them
    return {"cfg.json": json.dumps(cfg).encode(), "sae_weights.safetensors": save(tensors, {"from": "a test"})}


def same_weights(one: bytes, other: bytes) -> bool:
    """Whether two safetensors files hold the same tensors."""
    first, second = load(one), load(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


class SlowHub(LoopbackHub):
    """A loopback Hub that sends and takes bodies at `body_speed` bytes a second (None: as fast as it can).

    While `gate` is not set, large bodies stop after their first `CHUNK`: a test decides when they go on.
    """

    CHUNK = 1 << 18
    body_speed: float | None = None

    def __enter__(self) -> "SlowHub":
        self.gate = threading.Event()
        self.gate.set()
        super().__enter__()
        for server in self._servers:
            server.RequestHandlerClass = _SlowHandler
        return self

    def __exit__(self, *error: object) -> None:
        self.gate.set()
        super().__exit__(*error)

    def pause(self, n_bytes: int) -> None:
        if self.body_speed:
            time.sleep(n_bytes / self.body_speed)
        self.gate.wait(60)


class _Trickle:
    """A file that is read or written in chunks, with pauses."""

    def __init__(self, file: Any, hub: SlowHub):
        self._file, self._hub = file, hub

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        for start in range(0, len(view), SlowHub.CHUNK):
            self._file.write(view[start : start + SlowHub.CHUNK])
            if len(view) > SlowHub.CHUNK:
                self._hub.pause(SlowHub.CHUNK)
        return len(data)

    def read(self, size: int = -1) -> bytes:
        if size <= SlowHub.CHUNK:
            return self._file.read(size)
        parts = []
        while size > 0 and (part := self._file.read(min(size, SlowHub.CHUNK))):
            parts.append(part)
            size -= len(part)
            self._hub.pause(len(part))
        return b"".join(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _SlowHandler(_Handler):
    def setup(self) -> None:
        super().setup()
        self.rfile = _Trickle(self.rfile, self.server.hub)  # type: ignore[assignment]
        self.wfile = _Trickle(self.wfile, self.server.hub)  # type: ignore[assignment]


def environment(hub: LoopbackHub, settings: Any, hf_home: Path, **more: str) -> dict[str, str]:
    """Of a worker or server process: this checkout, the loopback Hub, these settings."""
    ours = {name: value for name, value in hub.env(hf_home).items() if not name.startswith("MECHINT_")}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**ours, **settings.environment(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


@contextlib.contextmanager
def worker(env: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A worker process that takes jobs while the block runs."""
    process = subprocess.Popen([sys.executable, "-m", "mechint.server.worker"], env=env)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Server:
    """`mechint serve` in a process of its own, on a port that stays the same when it is started again."""

    def __init__(self, env: dict[str, str]):
        self.env, self.port = env, 0
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, "-c", SERVE, "--port", str(self.port), "--workers", "1"]
        self.process = subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " at http://" in line, (line, self.process.poll())
        self.address = line.split(" at ")[1].split()[0]
        self.port = int(self.address.rsplit(":", 1)[1])

    def stop(self, *, kill: bool = False) -> int:
        assert self.process is not None
        self.process.kill() if kill else self.process.terminate()
        code = self.process.wait(timeout=30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def ask(self, path: str, body: dict[str, Any] | None = None, *, method: str | None = None) -> Any:
        """The JSON of an answer; an error's too."""
        data = json.dumps(body).encode() if body is not None else None
        headers = {"Content-Type": "application/json"} if data else {}
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return {"http_status": error.code, **json.load(error)}


def until(condition: Callable[[], Any], *, seconds: float = 90.0, what: str = "it") -> Any:
    """What `condition` returns once that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)
    return found


def ended(service: Any, job_id: str, *, seconds: float = 90.0) -> Any:
    """The job, once it is over."""
    from mechint.server.library import wait_for
    from mechint.server.models import LIVE

    job = wait_for(service, job_id, seconds)
    assert job.state not in LIVE, f"{job.kind} {job.state} {job.stage} after {seconds:.0f} s: {job.message}"
    return job


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
