"""The processes of a `torchrun`, or the single one that there is without it."""

import contextlib
import datetime
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def barrier(self) -> None:
        """Wait until every process is here. Can be interrupted, unlike torch's own."""
        if self.world_size > 1:
            import torch.distributed

            work = torch.distributed.barrier(async_op=True)
            while work is not None and not work.is_completed():
                time.sleep(0.02)

    def device(self, device: str | None) -> str | None:
        """`device`, or the GPU of this process where several share a machine."""
        if self.world_size > 1 and device in (None, "cuda"):
            import torch

            if torch.cuda.is_available():
                return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return device


@contextlib.contextmanager
def process_group() -> Iterator[Ranks]:
    """The group that `torchrun` (RANK, WORLD_SIZE in the environment) started, joined for the time of the block."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    import torch.distributed

    own = not torch.distributed.is_initialized()
    if own:
        # Processes finish hours apart when their texts differ; the default of half an hour would end the run.
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        yield Ranks(int(os.environ["RANK"]), world_size, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        if own:
            torch.distributed.destroy_process_group()
