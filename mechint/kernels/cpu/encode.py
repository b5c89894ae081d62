"""An SAE's active entries by the stages of the training step: its encoder product and its choice, without the rest."""

from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechint.kernels.cpu import choice
from mechint.kernels.cpu.kernel import DENSE_ABOVE, broken, has_bfloat16_products
from mechint.kernels.cpu.space import Space
from mechint.kernels.threads import pool
from mechint.sae import SAE


class Found(NamedTuple):
    """Entries row by row and by ascending latent. Row r's end at `ends[r]`; they begin where those of the row before
    end, or at `c * capacity` for the first row of chunk c = r // chunk."""

    chunk: int
    capacity: int
    cols: np.ndarray  # int32
    values: np.ndarray  # float32
    ends: np.ndarray  # int64


def entry_finder(sae: SAE) -> "EntryFinder | None":
    """None where these stages do not give what `encode` gives."""
    plain = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in sae.parameters())
    if not plain or sae.d_sae < 16 or not sae.W_enc.t().is_contiguous() or not sae.W_dec.is_contiguous():
        return None
    if not sae.is_plain or sae.departing():
        return None
    if sae.architecture not in ("standard", "topk", "jumprelu", "gated") or sae.peers.several_shares:
        return None
    if sae.architecture == "topk" and not sae.unit_decoder:  # its choice weighs latents by their decoder rows
        return None
    if sae.architecture == "jumprelu" and bool((sae.get_parameter("threshold") < 0).any()):
        return None  # negative pre-activations may pass
    return None if broken(sae.architecture) else EntryFinder(sae)


@final
class EntryFinder:
    """bfloat16 proposes where the processor is fast at it; every proposed entry is computed again in float32."""

    def __init__(self, sae: SAE):
        self.sae, self.narrow = sae, has_bfloat16_products()
        self.space: Space | None = None

    def find(self, x: Float[Tensor, "batch d_in"]) -> Found | None:
        """What it gives is valid until the next call; None for a batch that it cannot take: too dense, not finite."""
        threads = pool()
        x = x.to(torch.float32).contiguous()
        if self.space is None or self.space.batch != len(x):
            self.space = Space(
                self.sae, len(x), narrow=self.narrow, dense_above=DENSE_ABOVE, n_threads=threads.n_threads
            )
        space, sae = self.space, self.sae
        if not space.start(sae, x, threads):
            return None
        if sae.architecture == "jumprelu":
            space.set_bound(sae.get_parameter("threshold").detach().numpy())
        k = int(getattr(sae, "k", 0)) if sae.architecture == "topk" else 0

        def chunk(c: int, thread: int) -> None:
            if space.finite and not space.too_dense and space.encode(c, thread):
                space.find(c, thread, k=k)

        threads.run(chunk, space.n_chunks)
        if space.too_dense or not space.finite:
            return None
        values = self._magnitudes(space) if sae.architecture == "gated" else space.pre
        return Found(space.chunk, space.capacity, space.cols, values, space.ends)

    def _magnitudes(self, space: Space) -> np.ndarray:
        b_gate, b_mag, r_mag = (self.sae.get_parameter(name).detach() for name in ("b_gate", "b_mag", "r_mag"))
        space.separate_acts()
        for c in range(space.n_chunks):
            entries = (space.span(c)[0], space.n_entries[c], space.cols, space.pre)
            choice.gate(*entries, b_gate.numpy(), r_mag.exp().numpy(), b_mag.numpy(), space.acts)
        return space.acts
