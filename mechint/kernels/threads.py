"""Threads that share the work of one step.

Plain Python threads: the compiled loops and torch's products both run without the interpreter's lock. Each item of work
is claimed by whichever thread is free and writes only what is its own, so results do not depend on how many threads
there are or on who was faster.
"""

import itertools
import os
import threading
from collections.abc import Callable

import torch


class Pool:
    """`n_threads` threads, each with torch's own parallelism switched off, that wait (without spinning) for work.

    A pool of one is the calling thread itself.
    """

    def __init__(self, n_threads: int):
        self.n_threads = n_threads
        if n_threads == 1:
            return
        self._lock = threading.Lock()  # one user at a time
        self._start = [threading.Semaphore(0) for _ in range(n_threads)]
        self._done = threading.Semaphore(0)
        self._work: Callable[[int, int], None] = _nothing
        self._claims = itertools.count()
        self._n_items = 0
        self._error: BaseException | None = None
        for index in range(n_threads):
            threading.Thread(target=self._serve, args=(index,), name=f"sparse-{index}", daemon=True).start()
        self.run(_single_threaded, n_threads)
        # set_num_threads(1) in the workers is also what later threads would start from: put that back
        torch.set_num_threads(n_threads)

    def run(self, work: Callable[[int, int], None], n_items: int) -> None:
        """`work(item, thread)` for every item; returns when all are done, raises what the first failure raised."""
        if self.n_threads == 1:
            with torch.no_grad():
                for item in range(n_items):
                    work(item, 0)
            return
        with self._lock:
            self._work, self._n_items, self._claims, self._error = work, n_items, itertools.count(), None
            # while the pool is being made every thread has to take part
            n_threads = self.n_threads if work is _single_threaded else min(self.n_threads, n_items)
            for start in self._start[:n_threads]:
                start.release()
            interrupt = None
            for _ in range(n_threads):
                while True:  # an interrupt is kept until all threads have stopped writing
                    try:
                        self._done.acquire()
                        break
                    except KeyboardInterrupt as caught:
                        interrupt = caught
            self._work = _nothing
            if interrupt is not None or self._error is not None:
                raise interrupt or self._error  # type: ignore[misc]

    def _serve(self, thread: int) -> None:
        while True:
            self._start[thread].acquire()
            try:
                if self._work is _single_threaded:
                    torch.set_num_threads(1)
                else:
                    with torch.no_grad():
                        while self._error is None and (item := next(self._claims)) < self._n_items:
                            self._work(item, thread)
            except BaseException as error:
                self._error = error
            finally:
                self._done.release()


def _nothing(item: int, thread: int) -> None:
    pass


def _single_threaded(item: int, thread: int) -> None:
    """Marks the round in which every thread sets its own number of torch threads to one."""


_own = threading.local()


if hasattr(os, "register_at_fork"):  # threads do not survive a fork: the child makes its own
    os.register_at_fork(after_in_child=lambda: _own.__dict__.clear())


def pool() -> Pool:
    """The calling thread's pool for the number of threads that torch is set to now. Threads that train different SAEs
    side by side do not wait for each other."""
    n_threads = torch.get_num_threads()
    pools: dict[int, Pool] = _own.__dict__.setdefault("pools", {})
    if n_threads not in pools:
        pools[n_threads] = Pool(n_threads)
    return pools[n_threads]
