"""`--shard-latents`: a dictionary too large for one device, its latents split over the processes.

Process r of N has the latents from r d_sae / N to (r + 1) d_sae / N: encoder columns, decoder rows, biases and Adam
moments. All see the same batch. What crosses is the sum of the partial reconstructions `[batch, d_in]`, the candidates
of a TopK (`k` a row from each process), b_dec's gradient and some numbers; gradients of the latents stay at home.
Splitting rows and latents at once is not supported.

These are plain collectives rather than DTensor: what a TopK needs is a choice among the processes' k best, for which
DTensor would bring the whole `[batch, d_sae]` to each.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mechint.config import SAETrainConfig
from mechint.data.ranks import Ranks
from mechint.errors import MechintError
from mechint.kernels import Kernel, Pass
from mechint.sae import SAE
from mechint.sae.base import find_architecture
from mechint.sae.peers import Peers, Top
from mechint.train.parallel import SharedKernel, Team, check_same, top_of_all
from mechint.train.state import PLAIN_FIELDS, TrainState

MOMENTS = ("exp_avg", "exp_avg_sq")
# What an evaluation takes beside the weights, with some to spare.
EVALUATION_BYTES = 2**30


@final
class LatentTeam(Team):
    """Each process has a share of the latents and every row. The state file is that of one process: rank 0 puts it
    together, a tensor at a time."""

    def __init__(self, ranks: Ranks, config: SAETrainConfig):
        if config.num_features % ranks.world_size:
            raise MechintError(
                f"--shard-latents: {config.num_features} latents cannot be split over {ranks.world_size} processes in"
                " equal shares: change --d-sae or --expansion, or --nproc-per-node to a number that divides them"
            )
        if not find_architecture(config.architecture).shardable:
            raise MechintError(
                f"--shard-latents: architecture {config.architecture!r} does not say that its latents can be split"
                " (`shardable` in docs/extend.md): leave the flag out, and torchrun splits the rows"
            )
        if config.kernel not in ("auto", "dense"):
            raise MechintError(f"--shard-latents: steps are computed by --kernel dense, not {config.kernel}")
        self._latents = LatentPeers(ranks, config.num_features // ranks.world_size)
        super().__init__(ranks, self._latents)
        self._stops = False
        self._make: Callable[[], SAE] | None = None

    @property
    def stops(self) -> bool:
        return self._stops

    def build(self, make: Callable[[], SAE]) -> SAE:
        self._make = make

        def share() -> SAE:
            sae = make()
            for name, parameter in list(sae.named_parameters()):
                setattr(sae, name, nn.Parameter(self._share(name, parameter.detach())))
            sae.peers = self.peers
            return sae

        return self._in_turns(share)

    def kernel(self, sae: SAE, name: str, make: Callable[[str], Kernel]) -> Kernel:
        return SharedKernel(make("dense"), sae, self._together)

    def load(self, state: TrainState, fill: Callable[[TrainState], None]) -> None:
        def share() -> None:
            whole = self._empty(state)
            whole.sae.to_empty(device="cpu")
            whole.optimizer = _adam_like(state.optimizer, whole.sae)
            fill(whole)
            own, moments = dict(state.sae.state_dict()), _moments(whole)
            with torch.no_grad():
                for name, tensor in whole.sae.state_dict().items():
                    own[name].copy_(self._share(name, tensor))
            for name, parameter in state.sae.named_parameters():
                if name in moments:
                    values = moments[name]
                    mine = {key: self._share(name, values[key]).to(parameter.device) for key in MOMENTS}
                    state.optimizer.state[parameter] = {"step": values["step"].clone(), **mine}
            state.last_fired.copy_(whole.last_fired)
            for key in PLAIN_FIELDS:
                setattr(state, key, getattr(whole, key))

        self._in_turns(share)

    def whole(self, state: TrainState) -> TrainState | None:
        tensors = {name: self._gather(name, tensor) for name, tensor in state.sae.state_dict().items()}
        moments = {
            name: {key: self._gather(name, values[key]) for key in MOMENTS} | {"step": values["step"].cpu()}
            for name, values in _moments(state).items()
        }
        if not self.writes:
            return None
        whole = self._empty(state)
        whole.sae.load_state_dict({name: tensor for name, tensor in tensors.items() if tensor is not None}, assign=True)
        whole.sae.metadata, whole.sae.unit_decoder = state.sae.metadata, state.sae.unit_decoder
        whole.optimizer = _adam_like(state.optimizer, whole.sae)
        for name, parameter in whole.sae.named_parameters():
            if name in moments:
                whole.optimizer.state[parameter] = moments[name]
        whole.last_fired = state.last_fired.cpu()
        return whole

    def check(self, state: TrainState) -> None:
        same = {name: t for name, t in state.sae.state_dict().items() if SAE.latent_dim(name, t) is None}
        check_same(self.ranks, state, same)

    def evaluates_on(self, device: str | None, whole: SAE) -> str | None:
        if device != "cuda":
            return device
        free, _ = torch.cuda.mem_get_info()
        weights = sum(parameter.nbytes for parameter in whole.parameters())
        return device if weights + EVALUATION_BYTES < free else "cpu"

    def _together(self, sae: SAE, result: Pass) -> Pass:
        """Counts of all latents; terms are those of the whole SAE already. And whether anybody wants to stop."""
        d_sae, device = sae.d_sae, sae.W_enc.device
        counts = torch.zeros(3 + d_sae, dtype=torch.int64, device=device)
        counts[0] = int(self.stop_asked.is_set())
        counts[1] = int(not torch.isfinite(result.terms["loss"]))
        counts[2] = result.n_active
        counts[3:][self._latents.span] = result.fire_counts
        stop, not_finite = self.ranks.all_reduce(counts)[:2].tolist()
        self._stops = stop > 0
        terms = result.terms
        if not_finite:
            terms = dict.fromkeys(terms, torch.full((), torch.nan, device=device))
        return Pass(terms, counts[2], counts[3:])

    def _share(self, name: str, tensor: Tensor) -> Tensor:
        """This process's part of a tensor of the whole SAE."""
        dim = SAE.latent_dim(name, tensor)
        if dim is None:
            return tensor.clone()
        return tensor.narrow(dim, self._latents.span.start, self._latents.share).clone()

    def _gather(self, name: str, tensor: Tensor) -> Tensor | None:
        """A tensor of the whole SAE from the parts, in rank 0's main memory."""
        dim, own = SAE.latent_dim(name, tensor), tensor.detach().cpu()
        if dim is None:
            return own.clone()
        parts = self.ranks.gather(own.t() if dim else own)
        if parts is None:
            return None
        whole = torch.cat(parts)
        return whole.t() if dim else whole

    def _empty(self, state: TrainState) -> TrainState:
        """A state of the whole SAE without values: to be filled, or assigned to."""
        assert self._make is not None
        with torch.device("meta"):
            sae = self._make()
        optimizer, last_fired = _adam_like(state.optimizer, sae), torch.full((sae.d_sae,), -1)
        return dataclasses.replace(state, sae=sae, optimizer=optimizer, last_fired=last_fired)

    def _in_turns(self, work: Callable[[], Any]) -> Any:
        """One process after the other, so that the whole dictionary is in main memory once."""
        result = None
        for turn in range(self.ranks.world_size):
            if turn == self.ranks.rank:
                result = work()
            self.ranks.barrier()
        return result


@final
class LatentPeers(Peers):
    """The processes have other latents of the same SAE each, `share` of them, and the same rows."""

    several_shares = True

    def __init__(self, ranks: Ranks, share: int):
        self.ranks, self.share = ranks, share
        self.span = slice(ranks.rank * share, (ranks.rank + 1) * share)

    def shared(self, bias: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return _Shared.apply(bias, self.ranks)  # type: ignore[return-value]

    def sum_latents(self, part: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return _Sum.apply(part, self.ranks)  # type: ignore[return-value]

    def mean_latents(self, values: Float[Tensor, "batch d_sae"]) -> Float[Tensor, ""]:
        return self.sum_latents(values.mean() / self.ranks.world_size)

    def top(self, scores: Float[Tensor, "*batch d_sae"], k: int) -> Top:
        return top_of_all(self.ranks, scores, k, min(k, self.share))

    def top_of_batch(self, scores: Float[Tensor, " n"], k: int) -> Top:
        return top_of_all(self.ranks, scores, k, min(k, len(scores)))

    def here(self, start: int, stop: int) -> slice:
        first = min(max(start - self.span.start, 0), self.share)
        return slice(first, min(max(stop - self.span.start, first), self.share))

    def mine(self, values: Shaped[Tensor, " d_sae"]) -> Shaped[Tensor, " own"]:
        return values[self.span]

    def max_latents(self, value: Float[Tensor, ""]) -> Float[Tensor, ""]:
        return self.ranks.all_reduce(value.clone(), "max")

    def grad_norm(self, module: nn.Module) -> Float[Tensor, ""]:
        own, common = [], []
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                square = torch.linalg.vector_norm(parameter.grad).square()
                (common if SAE.latent_dim(name, parameter) is None else own).append(square)
        total = self.ranks.all_reduce(torch.stack(own).sum())
        return (total + sum(common)).sqrt()


class _Sum(torch.autograd.Function):
    """Forward: the sum over the processes. Backward: each part's gradient is the sum's."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks) -> Tensor:
        return ranks.all_reduce(part.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Shared(torch.autograd.Function):
    """Forward: as it is. Backward: what all processes' latents ask of it, summed."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.all_reduce(grads[0].contiguous().clone()), None


def _moments(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Adam's state by parameter."""
    by_parameter = state.optimizer.state
    return {name: by_parameter[p] for name, p in state.sae.named_parameters() if p in by_parameter}


def _adam_like(optimizer: torch.optim.Optimizer, sae: SAE) -> torch.optim.Adam:
    """A new Adam of the same settings for another SAE."""
    return torch.optim.Adam(sae.parameters(), **{**optimizer.defaults, "lr": optimizer.param_groups[0]["lr"]})
