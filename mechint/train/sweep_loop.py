"""Members of a sweep side by side: one reading of the activations, a thread for each core.

A worker thread takes the member that is furthest behind and does a few steps of it; the first to need a batch reads it,
the others find it. Each member's arithmetic is that of a run alone: the same calls in the same order, on weights and a
kernel of its own. With as many members as cores each gets one thread, so that no step waits for threads to meet.
"""

import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import IO

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.data.store import Activations
from mechint.errors import MechintError, one_line
from mechint.provenance import make_dir
from mechint.train.loop import out_of_memory
from mechint.train.resolve import split
from mechint.train.state import has_state
from mechint.train.sweep_grid import batch_key, split_key
from mechint.train.sweep_record import Member
from mechint.train.training import Training, advance, finish, prepare, save

# Steps of one member before its worker looks for another: its weights stay in the cache.
BURST = 4
# Bytes of batches that may be kept for members that are a little behind.
KEPT_BYTES = 2**28


class Batches:
    """Batches by (group, step), each read once while it is among the newest; safe to ask from several threads."""

    def __init__(self, n_kept: int):
        self.n_read = 0
        self._n_kept = n_kept
        self._kept: OrderedDict[Hashable, Future[Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, training: Training) -> Float[Tensor, "batch d_in"]:
        """The batch of the training's next step, on its device. Members of a group share the tensor."""
        step = training.state.step
        key = (batch_key(training.config), step)
        with self._lock:
            batch = self._kept.get(key)
            mine = batch is None
            if batch is None:
                batch = self._kept[key] = Future()
                self.n_read += 1
                while len(self._kept) > self._n_kept:
                    self._kept.popitem(last=False)
        if mine:
            try:
                rows = training.activations.rows(training.batches.indices(step))
                batch.set_result(rows.to(training.config.device))
            except BaseException as error:
                batch.set_exception(error)  # those who wait for it fail as well; who comes later tries again
                with self._lock:
                    self._kept.pop(key, None)
        return batch.result()


@dataclass(eq=False)
class Running:
    """A member while it trains."""

    member: Member
    training: Training | None  # None once it is done or has failed
    busy: bool = field(default=False)
    reached: int = 0  # steps done, also after the training is let go
    lock: IO[str] | None = None

    @property
    def step(self) -> int:
        return self.reached if self.training is None else self.training.state.step


class Crew:
    """Worker threads over the members of a sweep. `stop` ends them after the steps that they are in."""

    def __init__(
        self,
        members: list[Member],
        activations: Activations,
        *,
        stop: threading.Event,
        report: Callable[[Member], None] = lambda member: None,
        n_threads: int | None = None,
    ):
        """Prepare all members, one after another: initial weights come from torch's global generator.

        Args:
            report: called, in a worker, with each member that is done or has failed.
            n_threads: cores to use; what torch is set to if None.
        """
        self.activations, self.stop, self.report = activations, stop, report
        self.n_threads = n_threads or torch.get_num_threads()
        self._condition = threading.Condition()
        self._splits: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.elsewhere: list[Member] = []  # members that another process is training
        self.running: list[Running] = []
        for member in members:
            if not stop.is_set():
                self._add(member)
        configs = [running.member.config for running in self.running]
        on_cpu = all(config.device == "cpu" for config in configs)
        # an accelerator has one queue of work: a second thread would only wait for the first
        self.n_workers = max(1, min(self.n_threads, len(configs))) if on_cpu else 1
        largest = max((4 * config.batch_size * config.activation_dim for config in configs), default=1)
        groups = len({batch_key(config) for config in configs})
        self.burst = max(1, min(BURST, KEPT_BYTES // (largest * 3 * max(groups, 1))))
        self.batches = Batches(3 * self.burst * max(groups, 1))

    def _add(self, member: Member) -> None:
        running = Running(member, None, lock=member.claim())
        if running.lock is None:
            self.elsewhere.append(member)
            return
        self.running.append(running)
        try:
            with out_of_memory(member.config):
                self._prepare(running)
        except Exception as error:
            self._fail(running, error)

    def _prepare(self, running: Running) -> None:
        member, config = running.member, running.member.config
        key = split_key(config)
        if key not in self._splits:
            self._splits[key] = split(config, self.activations)
        make_dir(member.path)
        resumed = has_state(member.layout.state)
        if not resumed:
            member.layout.metrics.unlink(missing_ok=True)  # rows of steps that no state remembers
        training = prepare(config, self.activations, self._splits[key], member.layout, resumed=resumed)
        training.log.write = None
        if not resumed and config.save_every:
            save(training)
        running.training = training

    def start(self) -> list[threading.Thread]:
        """Start the workers. They end when no member is left, or soon after `stop` is set."""
        workers = [
            threading.Thread(target=self._work, args=(index,), name=f"sweep-{index}") for index in range(self.n_workers)
        ]
        for worker in workers:
            worker.start()
        return workers

    def save_all(self) -> None:
        """Write the state of every member that is not finished; call it when the workers have ended."""
        for running in self.running:
            if running.training is not None:
                save(running.training)
            if running.lock is not None:
                running.lock.close()

    def _work(self, index: int) -> None:
        own = self.n_threads // self.n_workers + (index < self.n_threads % self.n_workers)
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)  # which one is current is each thread's own
        while (running := self._claim()) is not None:
            torch.set_num_threads(own)
            try:
                with out_of_memory(running.member.config):
                    self._train(running)
            except Exception as error:
                self._fail(running, error)
            with self._condition:
                running.busy = False
                self._condition.notify_all()

    def _claim(self) -> Running | None:
        """The free member that is furthest behind; None when there is nothing left to do."""
        with self._condition:
            while not self.stop.is_set():
                left = [running for running in self.running if running.training is not None]
                if not left:
                    return None
                if free := [running for running in left if not running.busy]:
                    chosen = min(free, key=lambda running: running.step)
                    chosen.busy = True
                    return chosen
                self._condition.wait(timeout=1.0)  # a signal sets `stop` without a notice
        return None

    def _train(self, running: Running) -> None:
        training = running.training
        assert training is not None
        for _ in range(self.burst):
            if training.is_done:
                break
            advance(training, self.batches.get(training))
            every = training.config.save_every
            if every and training.state.step % every == 0 and not training.is_done:
                save(training)
            if self.stop.is_set():
                return
        if training.is_done:
            torch.set_num_threads(self.n_threads)  # sums over whole tensors depend on it: as in a run alone
            finish(training)
            self._let_go(running)

    def _let_go(self, running: Running) -> None:
        running.reached, running.training = running.step, None
        if running.lock is not None:
            running.lock.close()
        self.report(running.member)

    def _fail(self, running: Running, error: Exception) -> None:
        """Record the error and free the member's memory; the others go on."""
        if isinstance(error, MechintError):
            text = one_line(error, 1000)
        else:
            traceback.print_exception(error)
            text = f"{type(error).__name__}: {one_line(error, 1000)}"
        try:
            running.member.fail(text)
        except (MechintError, OSError):  # a full disk: the member stays unfinished
            traceback.print_exc()
        if running.training is not None:
            running.training.log.close()
        self._let_go(running)
