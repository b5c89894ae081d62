"""The processes of a `torchrun` that train one SAE, and how they share the work: rows, or latents."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mechint.config import SAETrainConfig
from mechint.data.ranks import Ranks, n_processes, process_group
from mechint.errors import MechintError
from mechint.train.parallel import DataTeam, Team
from mechint.train.parallel_latents import LatentTeam


@contextmanager
def join() -> Iterator[Ranks]:
    """The processes of this `torchrun`, each at its own GPU where there is one; one process alone without it."""
    if n_processes() == 1:
        yield Ranks()
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    # NCCL refuses two processes on one GPU; gloo exchanges through the CPU
    own_gpus = gpus and _n_here() <= gpus
    with process_group("cpu:gloo,cuda:nccl" if own_gpus else "gloo") as ranks:
        if ranks.rank > 0:
            logging.getLogger("mechint").setLevel(logging.ERROR)
        yield ranks


def make_team(ranks: Ranks, config: SAETrainConfig, *, resumed: bool = False) -> Team:
    """How the processes share the work of this config; what several began, one may go on with.

    Raises:
        MechintError: it cannot be split over that many processes, or the device is not one that they can share.
    """
    if ranks.world_size == 1:
        if config.shard_latents and not resumed:
            raise MechintError(
                "--shard-latents splits the latents over several processes, and there is one: start with torchrun"
                " --nproc-per-node N scripts/train_sae.py ..., or leave the flag out"
            )
        return Team()
    if config.device not in ("cpu", "cuda"):
        raise MechintError(
            f"several processes train on --device cuda (each takes a GPU of its own) or cpu, not {config.device}"
        )
    if ranks.rank == 0:
        _say(ranks, config)
    return LatentTeam(ranks, config) if config.shard_latents else DataTeam(ranks, config)


def _n_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(n_processes())))


def _say(ranks: Ranks, config: SAETrainConfig) -> None:
    """What a user would want to set otherwise, once."""
    threads = max(1, (os.cpu_count() or 1) // _n_here())
    if config.device == "cpu" and torch.get_num_threads() < threads:
        print(
            f"{ranks.world_size} processes with {torch.get_num_threads()} thread each, as torchrun sets it: with"
            f" OMP_NUM_THREADS={threads} before torchrun they use all cores",
            file=sys.stderr,
        )
    if config.device == "cuda" and not ranks.nccl:
        print(f"{_n_here()} processes share {torch.cuda.device_count()} GPUs: slower than one each", file=sys.stderr)


def describe(team: Team) -> dict[str, Any]:
    """What the manifest says of the processes; nothing for one alone."""
    n = team.ranks.world_size
    return {} if n == 1 else {"processes": n, "processes_share": "latents" if team.peers.several_shares else "rows"}
