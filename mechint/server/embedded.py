"""`mechint serve`: the web server in this process, its workers in processes beside it that are started anew when they
end."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import uvicorn

from mechint.config.serve import ServeConfig
from mechint.errors import MechintError
from mechint.provenance import make_dir
from mechint.server import library
from mechint.server.app import PREFIX, create_app
from mechint.server.security import check_binding
from mechint.server.settings import Settings, settings_from
from mechint.server.worker import GRACE_SECONDS, PIPE

# A worker that ends at once each time is started less and less often.
FIRST_PAUSE, LONGEST_PAUSE, LONG_LIFE = 0.5, 30.0, 20.0


def settings_of(config: ServeConfig) -> Settings:
    """The environment's settings, with those of the flags over them."""
    given = {
        "host": config.host,
        "port": config.port,
        "data_dir": config.data_dir,
        "runs_root": config.runs_root,
        "import_roots": config.import_root or None,
    }
    return dataclasses.replace(settings_from(), **{name: value for name, value in given.items() if value is not None})


class Workers:
    """Worker processes that live as long as this one. Use it with `with`; leaving puts their jobs back."""

    def __init__(self, settings: Settings, count: int):
        self.settings, self.count = settings, count
        self.processes: dict[int, subprocess.Popen] = {}
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        # workers hold the reading end: it ends when this process does, even by kill -9
        self._reading, self._writing = os.pipe()
        self._keepers = [threading.Thread(target=self._keep, args=(i,), daemon=True) for i in range(count)]

    def __enter__(self) -> "Workers":
        for keeper in self._keepers:
            keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stopping.set()
            os.close(self._writing)
        until = time.monotonic() + GRACE_SECONDS + 2.0
        for process in list(self.processes.values()):
            try:
                process.wait(timeout=max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for keeper in self._keepers:
            keeper.join(timeout=5)
        os.close(self._reading)

    def _start(self, slot: int) -> subprocess.Popen | None:
        with self._lock:
            if self._stopping.is_set():
                return None
            process = subprocess.Popen(
                [sys.executable, "-m", "mechint.server.worker"],
                env={**os.environ, **self.settings.environment(), PIPE: str(self._reading)},
                pass_fds=(self._reading,),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for this process; it tells the workers by the pipe
            )
            self.processes[slot] = process
            return process

    def _keep(self, slot: int) -> None:
        pause = FIRST_PAUSE
        while (process := self._start(slot)) is not None:
            began = time.monotonic()
            code = process.wait()
            if self._stopping.is_set():
                return
            pause = FIRST_PAUSE if time.monotonic() - began > LONG_LIFE else min(2 * pause, LONGEST_PAUSE)
            print(f"a worker ended (status {code}); started again in {pause:.0f} s", file=sys.stderr)
            self._stopping.wait(pause)


def listen(settings: Settings) -> socket.socket:
    """A listening socket. Raises `MechintError` for an address that is taken, or not ours."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise MechintError(f"--host {settings.host} is no address of this machine ({error.strerror})") from None
    # the protocol is named because asyncio turns Nagle's algorithm off only then: the end of an answer would wait 40 ms
    made = socket.socket(family, kind, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        raise MechintError(
            f"port {settings.port} of {settings.host} cannot be used ({error.strerror}): give another --port, or end"
            " what listens there"
        ) from None
    made.listen(256)
    return made


def serve(settings: Settings, workers: int | None = None) -> int:
    """Run the service until Ctrl-C or SIGTERM.

    Raises:
        MechintError: settings that cannot be used; nothing has been started then.
    """
    if workers is None:
        workers = 1 if settings.embedded else 0
    with listen(settings) as sock:
        settings = dataclasses.replace(settings, port=sock.getsockname()[1])
        check_binding(settings)
        make_dir(settings.data_dir)
        service = library.open_service(settings)
        app = create_app(settings, service=service)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="websockets-sansio",
            ws_max_size=1 << 16,
        )
        server = uvicorn.Server(config)
        # uvicorn raises the signal again when it has ended; what follows it here has to happen all the same
        signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            with Workers(settings, workers):
                host = f"[{settings.host}]" if ":" in settings.host else settings.host
                address = f"http://{host}:{settings.port}"
                print(f"serving {settings.data_dir} at {address}  (API: {address}{PREFIX}/saes)", flush=True)
                with contextlib.suppress(KeyboardInterrupt):
                    server.run(sockets=[sock])
                print("stopping; what is running goes on at the next start", file=sys.stderr)
        finally:
            service.db.close()
    return 0
