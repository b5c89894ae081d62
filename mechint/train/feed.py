"""Rows of the activations on the device that trains.

A step of a small SAE takes a GPU a tenth of the time in which a CPU gathers its rows and sends them over. So where the
activations fit beside the training they are sent once, and a batch is gathered where it is used.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.data.store import Activations

# Of a GPU's free memory, what the activations may take (in float32, as they are trained on).
SHARE = 0.5
BLOCK = 65_536  # rows sent at once


@final
class Feed:
    """`rows` as `Activations.rows` gives them, on `device`. `hold`: keep all of them there; by itself if not given."""

    def __init__(self, activations: Activations, device: str | torch.device, *, hold: bool | None = None):
        self.activations, self.device = activations, torch.device(device)
        self.held: Tensor | None = None
        if self._fits() if hold is None else hold:
            self.held = torch.empty(activations.n_rows, activations.d_in, device=self.device)
            for block in torch.arange(activations.n_rows).split(BLOCK):
                self.held[block[0] : block[-1] + 1] = activations.rows(block).to(self.device)

    def _fits(self) -> bool:
        if self.device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(self.device)
        return 4 * self.activations.n_rows * self.activations.d_in < SHARE * free

    def rows(self, indices: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]:
        """The rows with these numbers, in this order, in float32."""
        if self.held is not None:
            return self.held.index_select(0, indices.to(self.device))
        rows = self.activations.rows(indices)
        if self.device.type == "cuda":  # from pinned memory a copy need not be waited for
            return rows.pin_memory().to(self.device, non_blocking=True)
        return rows.to(self.device)
