"""Ctrl-C and SIGTERM (a cluster's warning before it takes the machine away) as something a loop can look at."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """Training was stopped by a signal; `command` goes on with it."""

    def __init__(self, command: str):
        super().__init__(command)
        self.command = command


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a step is never cut in half. A second Ctrl-C interrupts at once.

    Only the main thread may handle signals; elsewhere (a notebook's worker, a job queue) the event stays unset.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_signal(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
