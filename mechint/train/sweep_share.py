"""A sweep over several processes: ranks of torchrun, or jobs of a SLURM cluster through submitit.

Members are dealt once. From then on no process waits for another: each trains its share and looks at the folder; the
one that finds every member finished writes the table. A process that dies leaves its members unfinished, and --resume
goes on with them.
"""

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mechint.config import SweepConfig
from mechint.errors import MechintError
from mechint.train.signals import Stopped
from mechint.train.sweep import activations_of, conclude, resume, start, train_members
from mechint.train.sweep_record import SWEEP_JSON, Sweep, open_sweep

# Ranks wait this long for rank 0 to check the activations (it reads them once) and make the folder.
START_TIMEOUT = datetime.timedelta(minutes=30)
# Rank 0 waits this long for the others to have read what it says, should it have nothing to train itself.
READ_TIMEOUT = datetime.timedelta(minutes=1)


def deal(names: Sequence[str], count: int) -> list[list[str]]:
    """The members dealt to `count` shares like cards: neighbours in the grid, which cost alike, are spread."""
    return [list(names[index::count]) for index in range(count)]


def run_share(path: str | Path, names: Sequence[str], *, progress: bool = False) -> list[dict[str, Any]] | None:
    """What one of several processes does: its members, then the table if it finds all of them finished.

    Returns the rows of the table, or None while members are left to others. Raises `Stopped` as `train_members` does.
    """
    sweep = open_sweep(Path(path))
    activations = activations_of(sweep)
    train_members(sweep, names, activations, progress=progress)
    return conclude(sweep, activations, progress=progress)


# --- torchrun ---------------------------------------------------------------------------------------------------------


def n_ranks() -> int:
    """Processes that were started together (torchrun sets WORLD_SIZE), 1 for a process of its own."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_ranks(config: SweepConfig) -> tuple[Sweep, list[str]]:
    """The sweep, made or opened by rank 0, and the members of this rank.

    Raises:
        MechintError: what `start` and `resume` refuse (said by every rank), or rank 0 is not there.
    """
    rank, world = int(os.environ["RANK"]), n_ranks()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    # Only a store of keys and values, at the address that the launcher names; no process group, no collective.
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", rank, world, timeout=START_TIMEOUT))
        if rank == 0:
            said = _opened_by_rank_0(config, world)
            store.set("sweep", json.dumps(said))
            with contextlib.suppress(RuntimeError):  # one that died has nothing to read
                store.wait([f"read-{other}" for other in range(1, world)], READ_TIMEOUT)
        else:
            said = json.loads(store.get("sweep"))
            store.set(f"read-{rank}", "1")
    except (RuntimeError, ValueError) as error:  # torch's errors of stores are RuntimeErrors
        raise MechintError(f"rank {rank} found no rank 0 to start the sweep with ({error}): start all ranks") from error
    if "error" in said:
        raise MechintError(said["error"])
    return open_sweep(Path(said["path"])), said["shares"][rank]


def _opened_by_rank_0(config: SweepConfig, world: int) -> dict[str, Any]:
    try:
        restarted = config.name is not None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        folder = Path(config.runs_root) / str(config.name)
        if config.resume is not None or (restarted and (folder / SWEEP_JSON).is_file()):
            sweep, _ = resume(config.resume or folder)
        else:
            sweep, _ = start(config)
    except MechintError as error:
        return {"error": str(error)}
    return {"path": str(sweep.path), "shares": deal([member.name for member in sweep.unfinished], world)}


# --- SLURM ------------------------------------------------------------------------------------------------------------


class Share:
    """A job's share of a sweep as submitit takes it: called in the job, asked for a successor at the time limit."""

    def __init__(self, path: str, names: list[str]):
        self.path, self.names = path, names

    def __call__(self) -> int:
        """The number of members of this share that failed."""
        try:
            run_share(self.path, self.names)
        except Stopped as stopped:  # submitit reports exceptions, an interrupt would end it without a word
            raise RuntimeError(f"stopped; the states are saved. To go on: {stopped.command}") from None
        sweep = open_sweep(Path(self.path))
        return sum(member.status == "failed" for member in sweep.members if member.name in self.names)

    def checkpoint(self) -> Any:
        """Queued again, it goes on from the last saved states."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Share(self.path, self.names))


def check_slurm(cluster: str = "slurm") -> Any:
    """submitit, imported. Raises `MechintError` if it is not installed, or there is no SLURM here."""
    try:
        import submitit
    except ImportError:
        raise MechintError("--slurm needs submitit, which is not installed: pip install submitit") from None
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise MechintError("--slurm: there is no sbatch here; run this where jobs are submitted, or leave --slurm out")
    return submitit


def submit(sweep: Sweep, config: SweepConfig, *, cluster: str = "slurm") -> list[Any]:
    """Submit jobs that share the unfinished members; returns submitit's job objects. Logs go to `slurm/` in the folder.

    `cluster="local"` starts processes on this machine instead, `"debug"` runs the shares in this process.
    """
    submitit = check_slurm(cluster)
    names = [member.name for member in sweep.unfinished]
    executor = submitit.AutoExecutor(folder=sweep.path / "slurm", cluster=cluster)
    executor.update_parameters(
        name=f"sweep-{sweep.path.name}",
        timeout_min=config.slurm_time,
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=config.slurm_cpus,
        gpus_per_node=config.slurm_gpus,
        **({} if config.slurm_partition is None else {"slurm_partition": config.slurm_partition}),
    )
    shares = [share for share in deal(names, config.slurm_jobs) if share]
    return [executor.submit(Share(str(sweep.path), share)) for share in shares]
