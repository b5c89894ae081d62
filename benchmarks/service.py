"""What the sharing service bears: requests for its list, and clients that watch one download. CPU, one machine.

    python benchmarks/service.py [--saes 1000] [--rate 200] [--seconds 20] [--clients 100]

The service is `mechint serve` in a process of its own, with SQLite and an embedded worker, on the cores that the
clients use too.

list     the library holds `--saes` rows, of which one changes five times a second, as while a download tells its
         progress (what the server keeps of its answers is of no use then for longer). Requests for pages of 50 (some
         with a filter or a search) are sent at fixed times, `--rate` a second, over 16 connections that stay open; each
         latency is measured from the time at which the request was due, so a server that falls behind cannot hide it.
         Printed: latencies, errors, and the most requests a second that 16 clients get without a pause.
watch    `--clients` WebSocket clients subscribe to one download from a loopback Hub. Printed: how many saw the end, and
         the seconds from the first client's end to the last one's.
"""

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parents[1]

SAES = "/api/v1/saes"
PATHS = (f"{SAES}", f"{SAES}?skip=500&limit=50", f"{SAES}?status=ready", f"{SAES}?search=layer%206", f"{SAES}?limit=20")
CONNECTIONS, CHANGES = 16, 5
# The tests' loopback Hub with the folder of its first argument, until its standard input ends.
HUB = """
import json, sys
from pathlib import Path
from loopback_hub import LoopbackHub
from test_server_api import saelens_folder
folder = Path(sys.argv[1])
saelens_folder(folder / "repo" / "layer_6", d_sae=8192)
with LoopbackHub(folder) as hub:
    hub.add_repo("lab/saes", folder / "repo")
    print(json.dumps(hub.env(folder / "hf")), flush=True)
    sys.stdin.read()
"""
SERVE = "import sys; from mechint.cli.serve import main; sys.exit(main(sys.argv[1:]))"


def fill(data_dir: Path, n_saes: int) -> None:
    """A library of `n_saes` rows without files."""
    from mechint.server.db import open_database
    from mechint.server.models import SharedSAE
    from mechint.server.settings import Settings

    database = open_database(Settings(data_dir=data_dir))
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    with database.write() as session:
        for i in range(n_saes):
            session.add(
                SharedSAE(
                    name=f"GPT2 layer {i % 12} SAE {i}",
                    description="A sparse autoencoder on the residual stream of layer " + str(i % 12),
                    source=("huggingface", "local", "trained")[i % 3],
                    status=("ready", "ready", "error", "pending")[i % 4],
                    hf_repo_id="jbloom/GPT2-Small-SAEs",
                    hf_filepath=f"layer_{i % 12}",
                    model_name="gpt2",
                    layer=i % 12,
                    hook_type="residual",
                    n_features=24_576,
                    d_model=768,
                    architecture="standard",
                    format="community_standard",
                    file_size_bytes=151_000_000,
                    progress=100.0,
                    sae_metadata={"files_downloaded": 3, "is_directory": True, "original_format": "saelens"},
                    created_at=start + datetime.timedelta(minutes=i),
                )
            )
    database.close()


@contextmanager
def service(folder: Path, env: dict[str, str]) -> Iterator[int]:
    """`mechint serve` on a free port. Yields the port."""
    env = env | {"MECHINT_DATA_DIR": str(folder / "data"), "MECHINT_RUNS_ROOT": str(folder / "runs")}
    with open(folder / "service.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, "--port", "0"],
            env=env | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if "http://" in line:
                    port = int(line.split("http://", 1)[1].split("/")[0].split()[0].rsplit(":", 1)[1])
                    break
            else:
                raise SystemExit((folder / "service.log").read_text())
            yield port
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def changes(data_dir: Path) -> Iterator[None]:
    """One row's progress is written `CHANGES` times a second."""
    over = threading.Event()

    def write() -> None:
        with contextlib.closing(sqlite3.connect(data_dir / "mechint.db", timeout=30)) as database:
            while not over.wait(1 / CHANGES):
                with database:
                    database.execute(
                        "UPDATE saes SET progress = (progress + 1) % 100 WHERE id = (SELECT max(id) FROM saes)"
                    )

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield
    finally:
        over.set()
        writer.join()


class Client:
    """A connection that stays open."""

    async def open(self, port: int) -> "Client":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        return self

    async def get(self, path: str) -> int:
        """The status of the answer, once its body has arrived whole."""
        self.writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await self.reader.readexactly(length)
        return int(head.split()[1])


async def at_rate(port: int, rate: float, seconds: float) -> tuple[list[float], int]:
    """Seconds that each request took from the time it was due, and how many failed."""
    free: asyncio.Queue[Client] = asyncio.Queue()
    for _ in range(CONNECTIONS):
        free.put_nowait(await Client().open(port))
    latencies: list[float] = []
    failed = 0
    begin = time.perf_counter() + 0.2

    async def one(number: int) -> None:
        nonlocal failed
        due = begin + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        client = await free.get()
        status = await client.get(PATHS[number % len(PATHS)])
        free.put_nowait(client)
        latencies.append(time.perf_counter() - due)
        failed += status != 200

    await asyncio.gather(*(one(number) for number in range(round(rate * seconds))))
    return latencies, failed


async def flat_out(port: int, seconds: float) -> float:
    """Requests a second when each connection asks again as soon as it has its answer."""
    clients = [await Client().open(port) for _ in range(CONNECTIONS)]
    until, count = time.perf_counter() + seconds, 0

    async def ask(client: Client) -> None:
        nonlocal count
        while time.perf_counter() < until:
            await client.get(PATHS[count % len(PATHS)])
            count += 1

    await asyncio.gather(*(ask(client) for client in clients))
    return count / seconds


def list_case(folder: Path, n_saes: int, rate: float, seconds: float) -> None:
    folder.mkdir()
    fill(folder / "data", n_saes)
    with service(folder, dict(os.environ)) as port, changes(folder / "data"):
        asyncio.run(at_rate(port, rate, 2.0))  # warm: first statements, first threads
        latencies, failed = asyncio.run(at_rate(port, rate, seconds))
        most = asyncio.run(flat_out(port, min(seconds, 10.0)))
    ordered = sorted(latencies)
    shown = {
        f"p{q}": f"{1000 * ordered[min(len(ordered) - 1, int(len(ordered) * q / 100))]:.1f} ms" for q in (50, 95, 99)
    }
    print(
        f"list: {n_saes} SAEs, {rate:g} requests/s for {seconds:g} s: "
        + ", ".join(f"{name} {value}" for name, value in shown.items())
        + f", highest {1000 * ordered[-1]:.1f} ms, {failed} failed; without a pause {most:.0f} requests/s"
    )


async def watch(port: int, sae_id: str, n_clients: int) -> list[tuple[float, dict[str, Any]]]:
    import websockets

    joined = asyncio.Semaphore(0)

    async def one() -> tuple[float, dict[str, Any]]:
        async with websockets.connect(f"ws://127.0.0.1:{port}/ws", proxy=None, open_timeout=60) as socket:
            await socket.send(json.dumps({"action": "subscribe", "channel": f"sae/{sae_id}/download"}))
            joined.release()
            while True:
                message = json.loads(await socket.recv())
                if message.get("data", {}).get("status") in ("ready", "error"):
                    return time.perf_counter(), message["data"]

    return await asyncio.wait_for(asyncio.gather(*(one() for _ in range(n_clients))), 300)


@contextmanager
def loopback_hub(folder: Path) -> Iterator[dict[str, str]]:
    """A Hub with the SAE `layer_6` of `lab/saes`. Yields the environment of its clients."""
    process = subprocess.Popen(
        [sys.executable, "-c", HUB, str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT)))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(30)


def watch_case(folder: Path, n_clients: int) -> None:
    folder.mkdir()
    with loopback_hub(folder) as env, service(folder, env) as port:
        body = json.dumps({"repo_id": "lab/saes", "filepath": "layer_6"}).encode()
        asked = Request(f"http://127.0.0.1:{port}{SAES}/download", body, {"Content-Type": "application/json"})
        with urlopen(asked) as reply:
            sae_id = json.load(reply)["id"]
        ends = asyncio.run(watch(port, sae_id, n_clients))
    ready = [when for when, data in ends if data["status"] == "ready"]
    print(
        f"watch: {len(ready)} of {n_clients} clients saw the end, within {max(ready) - min(ready):.3f} s of each other"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=100)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        list_case(Path(temporary) / "list", arguments.saes, arguments.rate, arguments.seconds)
        watch_case(Path(temporary) / "watch", arguments.clients)


if __name__ == "__main__":
    main()
