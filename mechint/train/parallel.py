"""Several processes that train one SAE (`torchrun`): who takes which rows, and what they add up.

The batch of a step is the one that a single process would take. Each process computes terms and gradients on an equal
share of its rows; these are averaged, and every process makes the same update of the same weights, to the bit. So the
result is that of one process, but for the order in which sums are rounded. `--shard-latents` splits the latents
instead: see `mechint.train.parallel_latents`. `Team` is what the training asks, alone or not.
"""

import hashlib
import threading
from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mechint.config import SAETrainConfig
from mechint.data.ranks import Ranks
from mechint.errors import MechintError
from mechint.kernels import Kernel, Pass, StepResult, StepSettings
from mechint.sae import SAE, Objective
from mechint.sae.peers import ALONE, Peers, Top
from mechint.train.state import TrainState

# Gradients smaller than this (bytes) are sent together.
SMALL = 2**18


class Team:
    """One process; the base of those that are several."""

    def __init__(self, ranks: Ranks | None = None, peers: Peers = ALONE):
        self.ranks, self.peers = ranks or Ranks(), peers
        self.stop_asked = threading.Event()  # this process was asked to stop (Ctrl-C, SIGTERM)

    @property
    def stops(self) -> bool:
        """Whether all processes stop after the step that was made last."""
        return self.stop_asked.is_set()

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.ranks.rank == 0

    def build(self, make: Callable[[], SAE]) -> SAE:
        """The SAE that `make` draws, or this process's share of it."""
        sae = make()
        sae.peers = self.peers
        return sae

    def deal(self, indices: Int[Tensor, " batch"]) -> Int[Tensor, " own"]:
        """This process's rows of a batch."""
        return indices

    def kernel(self, sae: SAE, name: str, make: Callable[[str], Kernel]) -> Kernel:
        """What computes the steps: the kernel that `make` makes of `--kernel`'s name, or something around it."""
        return make(name)

    def load(self, state: TrainState, fill: Callable[[TrainState], None]) -> None:
        """Have `fill` set a state of the whole SAE, and take this process's share of it into `state`."""
        fill(state)

    def whole(self, state: TrainState) -> TrainState | None:
        """The state of the whole SAE where it is written, None elsewhere. All processes call this."""
        return state

    def check(self, state: TrainState) -> None:
        """Raise `MechintError` if the processes are no longer at the same step with the same weights."""

    def can_rescue(self) -> bool:
        """Whether this process can save the state when another is gone."""
        return False

    def evaluates_on(self, device: str | None, whole: SAE) -> str | None:
        """Where the trained SAE is evaluated."""
        return device

    def release(self) -> None:
        """From here on this process needs no other, and goes on without them."""
        if self.ranks.watch is not None:
            self.ranks.watch.grace = float("inf")


@final
class DataTeam(Team):
    """Each process has all weights and a share of each batch."""

    def __init__(self, ranks: Ranks, config: SAETrainConfig):
        super().__init__(ranks, RowPeers(ranks))
        self._stops = False
        if extra := config.batch_size % ranks.world_size:
            fewer, more = config.batch_size - extra, config.batch_size - extra + ranks.world_size
            raise MechintError(
                f"--batch-size {config.batch_size} cannot be split over {ranks.world_size} processes in equal shares:"
                f" use {f'{fewer} or ' if fewer else ''}{more}"
            )

    @property
    def stops(self) -> bool:
        return self._stops

    def deal(self, indices: Int[Tensor, " batch"]) -> Int[Tensor, " own"]:
        share = len(indices) // self.ranks.world_size
        return indices[self.ranks.rank * share : (self.ranks.rank + 1) * share]

    def kernel(self, sae: SAE, name: str, make: Callable[[str], Kernel]) -> Kernel:
        kernel = make(name)
        if sae.looks_across_rows and kernel.name != "dense":
            if name != "auto":
                raise MechintError(
                    f"--kernel {name} cannot train {sae.architecture} in several processes: use --kernel auto"
                )
            kernel = make("dense")
        return SharedKernel(kernel, sae, self._average)

    def whole(self, state: TrainState) -> TrainState | None:
        return state if self.writes else None

    def check(self, state: TrainState) -> None:
        check_same(self.ranks, state, dict(state.sae.state_dict()))

    def can_rescue(self) -> bool:
        return self.writes

    def _average(self, sae: SAE, result: Pass) -> Pass:
        """Terms and gradients averaged, counts summed; and whether anybody wants to stop."""
        device, n = sae.W_enc.device, self.ranks.world_size
        flags = torch.tensor([self.stop_asked.is_set(), not torch.isfinite(result.terms["loss"])])
        counts = torch.cat([flags.long().to(device), result.n_active.view(1), result.fire_counts])
        stop, not_finite = self.ranks.all_reduce(counts)[:2].tolist()
        self._stops = stop > 0
        if not_finite:  # then nobody's gradients count, and somebody may have none
            nan = torch.full((), torch.nan, device=device)
            return Pass(dict.fromkeys(result.terms, nan), counts[2], counts[3:])
        gradients = [_dense(p.grad) for p in sae.parameters() if p.grad is not None]
        small = [torch.stack(list(result.terms.values()))]
        small += [grad for grad in gradients if grad.nbytes < SMALL]
        together = torch.cat([values.flatten() for values in small])
        for values in (together, *(grad for grad in gradients if grad.nbytes >= SMALL)):
            self.ranks.all_reduce(values).div_(n)
        averaged = together.split([values.numel() for values in small])
        for values, own in zip(averaged[1:], small[1:], strict=True):
            own.copy_(values.view_as(own))
        terms = dict(zip(result.terms, averaged[0].unbind(), strict=True))
        return Pass(terms, counts[2], counts[3:])


@final
class RowPeers(Peers):
    """The processes have other rows of the same batch each."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def mean_rows(self, mean: Float[Tensor, ""]) -> Float[Tensor, ""]:
        # the gradient is that of this process's rows: gradients are averaged like the mean
        of_all = self.ranks.all_reduce(mean.detach().clone()) / self.ranks.world_size
        return of_all + (mean - mean.detach())

    def n_rows(self, own: int) -> int:
        return own * self.ranks.world_size

    def top_of_batch(self, scores: Float[Tensor, " n"], k: int) -> Top:
        return top_of_all(self.ranks, scores, k, min(k, len(scores)))

    def gather_rows(self, rows: Shaped[Tensor, "own ..."]) -> Shaped[Tensor, "batch ..."]:
        return torch.cat(self.ranks.all_gather(rows))


@final
class SharedKernel:
    """A kernel whose passes are made one with those of the other processes before it updates."""

    def __init__(self, kernel: Kernel, sae: SAE, reduce: Callable[[SAE, Pass], Pass]):
        self.kernel, self.sae, self.reduce, self.name = kernel, sae, reduce, kernel.name

    def backward(self, x: Float[Tensor, "own d_in"], objective: Objective) -> Pass:
        return self.reduce(self.sae, self.kernel.backward(x, objective))

    def update(self, lr: float, max_grad_norm: float) -> Float[Tensor, ""]:
        return self.kernel.update(lr, max_grad_norm)

    def step(self, x: Float[Tensor, "own d_in"], settings: StepSettings) -> StepResult:
        result = self.backward(x, settings.objective)
        if not torch.isfinite(result.terms["loss"]):
            return StepResult(*result, torch.full_like(result.terms["loss"], torch.nan))
        return StepResult(*result, self.update(settings.lr, settings.max_grad_norm))


def top_of_all(ranks: Ranks, scores: Shaped[Tensor, "*rows n"], k: int, width: int) -> Top:
    """The `k` largest over the last dimension of all processes, each of which sends its `width` largest: min(k, n), or
    what is the same everywhere where n is not."""
    own = scores.topk(min(k, scores.shape[-1]), dim=-1)
    missing = width - own.values.shape[-1]
    values = torch.nn.functional.pad(own.values, (0, missing), value=-torch.inf) if missing else own.values
    offered = torch.stack(ranks.all_gather(values), dim=-2)
    best = offered.flatten(-2).topk(min(k, offered.shape[-1] * ranks.world_size), dim=-1)
    chosen = torch.zeros_like(offered, dtype=torch.bool).flatten(-2).scatter(-1, best.indices, True).view_as(offered)
    return Top(best.values, own.indices, chosen[..., ranks.rank, : own.values.shape[-1]])


def check_same(ranks: Ranks, state: TrainState, tensors: dict[str, Tensor]) -> None:
    """Raise `MechintError` unless all processes are at the same step with the same bits in `tensors`."""
    digest = hashlib.sha256(state.step.to_bytes(8, "little"))
    for tensor in tensors.values():
        digest.update(_dense(tensor.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    mine = torch.tensor(list(digest.digest()), dtype=torch.uint8)
    if any(not torch.equal(mine, other) for other in ranks.all_gather(mine)):
        raise MechintError(
            f"the processes no longer have the same weights (step {state.step}): machines that compute differently, or"
            " files that are not the same everywhere; go on from the last saved state with one kind of machine"
        )


def _dense(tensor: Tensor) -> Tensor:
    """The same memory in its own order: W_enc's lies column by column."""
    return tensor.t() if tensor.ndim == 2 and not tensor.is_contiguous() else tensor
