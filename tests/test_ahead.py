"""Threads that make items ahead and finish jobs behind: order, bounds, errors, and an end."""

import contextlib
import threading
import time

import pytest

from mechint.data.ahead import Behind, ahead


def alive() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(("ahead", "behind"))}


def test_items_come_in_order_and_made_no_further_than_two_ahead():
    made: list[int] = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    for i, item in enumerate(ahead(items())):
        assert item == i and len(made) <= i + 4
        time.sleep(0.002)
    assert made == list(range(20)) and not alive()
    assert list(ahead([])) == []


def test_items_are_made_on_another_thread_while_this_one_works():
    names = list(ahead(threading.current_thread().name for _ in range(3)))
    assert set(names) == {"ahead"}


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt(), StopAsyncIteration()])
def test_an_error_comes_after_the_items_before_it(error: BaseException):
    def items():
        yield from (1, 2)
        raise error

    found = []
    with pytest.raises(type(error)) as raised:
        for item in ahead(items()):
            found.append(item)
    assert found == [1, 2] and raised.value is error and not alive()


def test_closing_ends_the_thread_and_what_makes_the_items():
    closed = []

    def items():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    with contextlib.closing(ahead(items())) as ready:
        assert next(ready) == 1
    assert closed and not alive()


def test_jobs_are_bounded_and_all_done_at_the_end():
    running, most, done = set(), [], []
    lock = threading.Lock()

    def job(i: int) -> None:
        with lock:
            running.add(i // 3)
            most.append(len(running))
        time.sleep(0.005)
        done.append(i)
        with lock:
            running.discard(i // 3)

    with Behind(2, threads=6) as behind:
        for group in range(8):
            behind.submit([lambda i=i: job(i) for i in range(3 * group, 3 * group + 3)])
    assert sorted(done) == list(range(24)) and 1 < max(most) <= 2 and not alive()


@pytest.mark.parametrize("error", [ValueError("full"), KeyboardInterrupt()])
def test_a_failed_job_is_raised_by_the_next_one_or_the_end(error: BaseException):
    def fail() -> None:
        raise error

    done: list[int] = []
    with pytest.raises(type(error)) as raised, Behind(1, threads=2) as behind:
        behind.submit([fail, lambda: done.append(0)])
        behind.submit([lambda: done.append(1)])
        raise AssertionError("not reached")
    assert raised.value is error and done == [0]
    with pytest.raises(type(error)), Behind(1, threads=1) as behind:
        behind.submit([fail])
    assert not alive()


def test_an_error_of_the_block_waits_for_the_jobs():
    done: list[int] = []

    def slow() -> None:
        time.sleep(0.05)
        done.append(1)

    with pytest.raises(KeyError), Behind(1, threads=1) as behind:
        behind.submit([slow])
        raise KeyError
    assert done == [1] and not alive()
