"""Run a command with a PostgreSQL and a Redis of its own on 127.0.0.1, which go when it ends.

    python tests/with_services.py python -m pytest tests/test_server_jobs.py

The programs are those of Debian's `postgresql` and `redis-server`. The command gets MECHINT_TEST_DATABASE_URL and
MECHINT_TEST_BROKER_URL, by which the tests of the service use them in place of SQLite and files (tests/serving.py).
"""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

WAIT_SECONDS = 60.0


def main(command: list[str]) -> int:
    if not command:
        sys.exit("give the command to run")
    with tempfile.TemporaryDirectory(prefix="mechint-services-") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)  # PostgreSQL runs as another user where we are root
        with postgresql(folder) as database, redis(folder) as broker:
            env = os.environ | {"MECHINT_TEST_DATABASE_URL": database, "MECHINT_TEST_BROKER_URL": broker}
            return subprocess.run(command, env=env).returncode


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """The address of a new database server, without a database's name."""
    bins = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    server = shutil.which("postgres") or (bins and str(bins[-1] / "postgres"))
    if not server:
        sys.exit("no PostgreSQL here: apt-get install postgresql")
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    home, port = folder / "postgres", free_port()
    home.mkdir()
    if user:
        shutil.chown(home, user)
    name = user or pwd.getpwuid(os.geteuid()).pw_name
    init = [str(Path(server).with_name("initdb")), "-D", str(home / "db"), "-A", "trust", "-U", name]
    subprocess.run(init, user=user, cwd=home, check=True, stdout=subprocess.DEVNULL)
    # What is lost when the machine stops does not matter here, so nothing is waited for.
    options = {"listen_addresses": "127.0.0.1", "fsync": "off", "max_connections": "200"}
    words = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
    log = open(folder / "postgres.log", "wb")  # noqa: SIM115
    process = subprocess.Popen(
        [server, "-D", str(home / "db"), "-p", str(port), "-k", str(home), *words],
        user=user,
        cwd=home,
        stdout=log,
        stderr=log,
    )
    with running(process, port, folder / "postgres.log"):
        yield f"postgresql://{name}@127.0.0.1:{port}"


@contextlib.contextmanager
def redis(folder: Path) -> Iterator[str]:
    """The address of a new Redis that keeps nothing."""
    server = shutil.which("redis-server")
    if not server:
        sys.exit("no Redis here: apt-get install redis-server")
    port = free_port()
    words = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
    log = open(folder / "redis.log", "wb")  # noqa: SIM115
    process = subprocess.Popen([server, *words], stdout=log, stderr=log)
    with running(process, port, folder / "redis.log"):
        yield f"redis://127.0.0.1:{port}"


@contextlib.contextmanager
def running(process: subprocess.Popen[bytes], port: int, log: Path) -> Iterator[None]:
    """The block runs once something listens at `port`; the process ends with it."""
    try:
        until = time.monotonic() + WAIT_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if process.poll() is not None or time.monotonic() > until:
                sys.exit(f"{process.args} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(timeout=WAIT_SECONDS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
