"""The processes of a `torchrun`, or the single one that there is without it. None waits for ever for one that is gone:
see `mechint.data.watch`."""

import contextlib
import datetime
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mechint.data.watch import GRACE, RankLost, Watch, limit_seconds
from mechint.errors import MechintError, one_line

# The collectives' own limit: none, in effect. The watch decides.
NO_LIMIT = datetime.timedelta(days=30)
# A process that leaves its error to another one waits this long: torchrun ends all others as soon as one has ended.
SILENT_SECONDS = 2.0


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is, and what they say to each other."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    nccl: bool = False  # whether tensors on a GPU are exchanged by NCCL
    watch: Watch | None = field(default=None, compare=False)

    def barrier(self) -> None:
        """Wait until every process is here, however long that takes. Can be interrupted, unlike torch's own."""
        if self.world_size == 1:
            return
        assert self.watch is not None
        self.watch.barrier()

    def device(self, device: str | None) -> str | None:
        """`device`, or the GPU of this process where several share a machine."""
        if self.world_size > 1 and device in (None, "cuda"):
            import torch

            if torch.cuda.is_available():
                return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return device

    def _run(self, tensor: Any, start: Callable[[], Any]) -> None:
        """A collective, which `start` begins, to its end. Raises `RankLost` if another process is gone."""
        assert self.watch is not None
        try:
            work = start()
        except RuntimeError as error:
            raise self.watch.lost(error) from error
        if self.nccl and tensor.is_cuda:
            work.wait()  # queued behind what the GPU does; if it never ends there, the watch ends the process
            return
        while True:
            try:
                work.wait(datetime.timedelta(seconds=0.5))
                return
            except RuntimeError as error:  # either these 0.5 s are over, or the other side is
                if work.is_completed():
                    raise self.watch.lost(error) from error
                if self.watch.found:
                    raise self.watch.lost() from error

    def all_reduce(self, tensor: Any, op: str = "sum") -> Any:
        """Sum (or `max`) over the processes, in place; the same bits on each."""
        import torch.distributed as dist

        kind = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op]
        self._run(tensor, lambda: dist.all_reduce(tensor, kind, async_op=True))
        return tensor

    def all_gather(self, tensor: Any) -> list[Any]:
        """The tensor of each process, in the order of ranks; all of one shape."""
        import torch
        import torch.distributed as dist

        tensor = tensor.contiguous()
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        self._run(tensor, lambda: dist.all_gather(gathered, tensor, async_op=True))
        return gathered

    def gather(self, tensor: Any) -> list[Any] | None:
        """As `all_gather`, for rank 0 alone."""
        import torch
        import torch.distributed as dist

        tensor = tensor.contiguous()
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)] if self.rank == 0 else None
        self._run(tensor, lambda: dist.gather(tensor, gathered, dst=0, async_op=True))
        return gathered

    def broadcast(self, tensor: Any) -> Any:
        """The tensor of rank 0, in place."""
        import torch.distributed as dist

        self._run(tensor, lambda: dist.broadcast(tensor, src=0, async_op=True))
        return tensor

    def tell(self, text: str | None) -> str:
        """The text of rank 0, on all processes; the others pass None."""
        if self.world_size == 1:
            assert text is not None
            return text
        assert self.watch is not None
        return self.watch.tell(text)


def n_processes() -> int:
    """How many processes `torchrun` started (WORLD_SIZE in the environment); 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launcher(script: str) -> str:
    """How a command begins that goes on with as many processes as there are now."""
    if n_processes() == 1:
        return f"python {script}"
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    nodes = f"--nnodes {n_processes() // per_node} " if n_processes() > per_node else ""
    return f"torchrun {nodes}--nproc-per-node {per_node} {script}"


@contextlib.contextmanager
def process_group(backend: str = "gloo") -> Iterator[Ranks]:
    """The group that `torchrun` (RANK, WORLD_SIZE in the environment) started, joined for the time of the block.

    A block that ends with an error ends the other processes as well; what all of them find wrong, one prints. After a
    `RankLost` this process is to end: what the collectives left behind may not let it, so it gets `GRACE` seconds.
    """
    world_size = n_processes()
    if world_size == 1:
        yield Ranks()
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if "RANK" not in os.environ:
        raise MechintError("WORLD_SIZE is set but RANK is not: start with torchrun, or unset WORLD_SIZE")
    limit = limit_seconds()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    # By torch's own rules, torchrun or rank 0 keeps the store; each time that a group is joined has names of its own.
    store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(minutes=10)))
    turn = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_TURNS)}"
    dist.init_process_group(backend, store=PrefixStore(turn, store), rank=rank, world_size=world_size, timeout=NO_LIMIT)
    watch = Watch(PrefixStore(f"watch/{turn}", store), rank, world_size, limit)
    try:
        yield Ranks(rank, world_size, local_rank, "nccl" in backend, watch)
    except RankLost:
        speaks = watch.speaks()
        watch.leave()
        if hasattr(signal, "alarm"):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(GRACE))
        if not speaks:
            time.sleep(SILENT_SECONDS)
            raise SystemExit(2) from None
        raise
    except BaseException as error:
        reason = one_line(error, limit=1000) or type(error).__name__
        watch.leave(reason)
        # what is wrong with the command is wrong on all processes
        if isinstance(error, MechintError) and rank > 0 and watch.reason_of(0, 3.0) == reason:
            time.sleep(SILENT_SECONDS)
            raise SystemExit(2) from None
        raise
    else:
        watch.leave()
        if not watch.found:
            dist.destroy_process_group()


_TURNS = itertools.count()
