"""Work on other threads: items made ahead of time, and jobs that are finished behind.

Both keep the order of results and pass on what goes wrong, so that a program is the same with them as without.
"""

import collections
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar, final

T = TypeVar("T")
_POLL = 0.1  # seconds between looks at whether anybody still wants what is being made


def ahead(items: Iterable[T]) -> Generator[T]:
    """The items, while the next ones are being made on another thread: one ready, one in the making.

    What `items` raises is raised here, after the items before it. Closing this generator (`contextlib.closing`) waits
    for the item in the making and ends the thread.
    """
    ready: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(1)
    unwanted = threading.Event()

    def put(last: bool, value: T | BaseException | None) -> bool:
        while not unwanted.is_set():
            try:
                ready.put((last, value), timeout=_POLL)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(False, item):
                    return
            put(True, None)
        except BaseException as error:  # whatever it is belongs to the thread that asked
            put(True, error)
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            last, value = ready.get()
            if isinstance(value, BaseException) and last:
                raise value
            if last:
                return
            yield value  # pyright: ignore[reportReturnType]
    finally:
        unwanted.set()
        thread.join()


@final
class Behind:
    """Groups of jobs on other threads; `submit` waits until fewer than `limit` groups are unfinished.

    What a job raises, the next `submit` or the end of the block raises. A block that ends with an error waits for the
    jobs that run, too, so that nothing is written behind the caller's back.
    """

    def __init__(self, limit: int, threads: int):
        self._limit = limit
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="behind")
        self._groups: collections.deque[list[Future[None]]] = collections.deque()

    def submit(self, jobs: Sequence[Callable[[], None]]) -> None:
        while len(self._groups) >= self._limit:
            self._wait_for_one()
        self._groups.append([self._pool.submit(job) for job in jobs])

    def _wait_for_one(self) -> None:
        for job in self._groups.popleft():
            job.result()

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        try:
            while kind is None and self._groups:
                self._wait_for_one()
        finally:
            self._pool.shutdown(wait=True)
