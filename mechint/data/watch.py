"""Noticing that another process of a group is gone.

Each process shows every second or so, in the store that all of them reach, that it lives; when one has been silent for
`limit_seconds()`, or said why it ended, the others end too. Waiting long is no fault: a process may be hours behind as
long as it lives.
"""

import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from mechint.errors import MechintError, one_line

# Seconds without a sign of life after which a process counts as gone.
LIMIT_VARIABLE, DEFAULT_LIMIT = "MECHINT_RANK_TIMEOUT", 30.0
# Seconds that a process has to end by itself once another is gone, before it is ended: it may hang in a driver.
GRACE = 10.0

T = TypeVar("T")


class RankLost(MechintError):
    """Another process of the group is gone; nothing can be exchanged any more."""


class Watch:
    """Signs of life of all processes, written and read by a thread beside the work."""

    def __init__(self, store: Any, rank: int, world_size: int, limit: float):
        self.rank, self.world_size, self.limit = rank, world_size, limit
        # Connections of its own, one for each thread: a question that waits on one holds up all others on it.
        self._store, self._thread_store = store.clone(), store.clone()
        for connection in (self._store, self._thread_store):
            connection.set_timeout(datetime.timedelta(seconds=max(limit, 5.0)))
        self.interval = min(1.0, limit / 8)
        self.advice = ""  # how to go on, for a process that can only be ended
        self.found = ""  # what happened to another process
        self.grace = GRACE
        self._says_it_itself = False  # that process prints what happened
        self._gone: set[int] = set()
        self._left: set[int] = set()
        self._beats: dict[int, tuple[int, float]] = {}  # rank -> (its last beat, when it was seen)
        self._barriers = self._tellings = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signs of life", daemon=True)
        self._thread.start()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        beat, deadline, now = 0, float("inf"), time.monotonic()
        self._beats = {rank: (0, now) for rank in range(self.world_size) if rank != self.rank}
        while not self._over.wait(self.interval):
            beat += 1
            try:
                self._thread_store.set(f"beat/{self.rank}", str(beat))  # also while ending: this process is not gone
                self._look()
            except RuntimeError:  # what the store raises
                if not self._over.is_set():
                    self._find("process 0 or torchrun, which keeps the store of the group, is gone", {0})
            if self.found:
                deadline = min(deadline, time.monotonic() + self.grace)
            if time.monotonic() > deadline:
                if self.speaks():
                    # on a line of its own: a progress bar may be standing there
                    print(f"\nerror: {self.found}; {self.advice}".rstrip("; "), file=sys.stderr, flush=True)
                os._exit(2)

    def _look(self) -> None:
        silent = set()
        for rank, (before, since) in list(self._beats.items()):
            if self._thread_store.check([f"left/{rank}"]):
                self._left.add(rank)
                if reason := self._thread_store.get(f"left/{rank}").decode():
                    self._says_it_itself = self._says_it_itself or not self.found
                    self._find(f"process {rank} of {self.world_size} ended: {reason}", {rank})
                continue
            key, now = f"beat/{rank}", time.monotonic()
            beat = int(self._thread_store.get(key)) if self._thread_store.check([key]) else 0
            if beat != before:
                self._beats[rank] = (beat, now)
            elif now - since > self.limit:
                silent.add(rank)
        if silent:
            self._find(f"{self._name(silent)} gone: no sign of life for {self.limit:g} s", silent)

    def _name(self, ranks: set[int]) -> str:
        words = f"{', '.join(map(str, sorted(ranks)))} of {self.world_size}"
        return f"process {words} is" if len(ranks) == 1 else f"processes {words} are"

    def _find(self, what: str, gone: set[int]) -> None:
        self._gone |= gone
        self.found = self.found or what

    # --- for the main thread ------------------------------------------------------------------------------------------

    def lost(self, error: Exception | None = None) -> RankLost:
        """The error to raise after a collective failed. Takes five intervals at most, to see who is gone and why."""
        self._wait(2 * self.interval)  # a beat from just before the end is read by then
        before = dict(self._beats)
        self._wait(3 * self.interval)
        if not self.found:
            silent = {rank for rank in before.keys() - self._left if self._beats[rank] == before[rank]}
            if silent:
                self._find(f"{self._name(silent)} gone: the connection broke, and no sign of life", silent)
            else:
                self._find(f"the connection to another process broke ({one_line(error or '', 120)})", set())
        return RankLost(self.found)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.found and time.monotonic() < until:
            time.sleep(0.05)

    def speaks(self) -> bool:
        """Whether this process is the one to print what happened: the first of those that are left."""
        return not self._says_it_itself and self.rank == min(set(range(self.world_size)) - self._gone)

    def barrier(self) -> None:
        """Through the store, so that no collective's limit applies however long the others take."""
        self._barriers += 1
        key = f"barrier/{self._barriers}"
        self._ask(lambda: self._store.set(f"{key}/{self.rank}", "1"))
        keys = [f"{key}/{rank}" for rank in range(self.world_size)]
        self._until(keys)

    def tell(self, text: str | None) -> str:
        """See `Ranks.tell`."""
        self._tellings += 1
        key = f"told/{self._tellings}"
        if self.rank == 0:
            assert text is not None
            self._ask(lambda: self._store.set(key, text))
            return text
        self._until([key])
        return self._ask(lambda: self._store.get(key)).decode()

    def _until(self, keys: list[str]) -> None:
        pause = 0.005
        while not self._ask(lambda: self._store.check(keys)):
            if self.found:
                raise RankLost(self.found)
            time.sleep(pause)
            pause = min(0.2, 1.5 * pause)

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except RuntimeError as error:
            raise self.lost(error) from error

    def leave(self, reason: str = "") -> None:
        """This process needs the others no more; with a reason, they have to end as well."""
        self._over.set()
        with contextlib.suppress(RuntimeError):  # the store may be gone with its process
            self._store.set(f"left/{self.rank}", reason)
            # Rank 0 may be the one that keeps the store: the others should have read it before it goes.
            waits = [f"left/{rank}" for rank in range(1, self.world_size) if rank not in self._gone]
            until = time.monotonic() + 5.0
            while self.rank == 0 and waits and not self._store.check(waits) and time.monotonic() < until:
                time.sleep(0.02)

    def reason_of(self, rank: int, seconds: float) -> str | None:
        """Why another process left, if it says so within some seconds."""
        until = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < until:
                if self._store.check([f"left/{rank}"]):
                    return self._store.get(f"left/{rank}").decode()
                time.sleep(0.02)
        return None


def limit_seconds() -> float:
    """Seconds without a sign of life after which a process counts as gone: `MECHINT_RANK_TIMEOUT`, or 30."""
    text = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 1 <= limit < 1e6:
        raise MechintError(
            f"{LIMIT_VARIABLE} is the number of seconds after which a silent process counts as gone, 1 or more, got"
            f" {text!r}"
        )
    return limit
