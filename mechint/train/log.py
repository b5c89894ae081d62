"""metrics.csv while a run goes on: a row each `log_every` steps, to the file, the terminal and an optional service."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mechint.config import SAETrainConfig
from mechint.eval.rows import append_metrics_row
from mechint.kernels import StepResult
from mechint.train.dead import dead_latents
from mechint.train.state import TrainState
from mechint.train.track import open_tracker

# A latent is dense when it is active on more than this share of a batch (docs/metrics.md).
DENSE_SHARE = 0.1


class MetricsLog:
    """Rows of one training's metrics.csv. A row describes the batch before that step's update."""

    def __init__(self, config: SAETrainConfig, path: Path, *, variance: float, writes: bool = True):
        self.config, self.path, self.variance, self.writes = config, path, variance, writes
        self.every = config.log_every or max(config.steps // 10, 1)
        self.write: Callable[[str], Any] | None = print  # where the line of each row goes; None: nowhere
        self._tracker = open_tracker(config, path.parent) if writes else None
        self._since, self._steps = time.perf_counter(), 0

    def add(self, step: int, result: StepResult, state: TrainState, *, lr: float, lam: float) -> None:
        """Count a step, and write its row if one is due."""
        self._steps += 1
        if step % self.every and state.step != self.config.steps:
            return
        now = time.perf_counter()
        rate = self._steps * self.config.batch_size / max(now - self._since, 1e-9)
        self._since, self._steps = now, 0
        row = self.row(step, result, state, lr=lr, lam=lam) | {"vectors_per_second": round(rate, 1)}
        if not self.writes:  # several processes make a row together, and one writes it
            return
        append_metrics_row(self.path, row)
        if self._tracker is not None:
            self._tracker.log({name: value for name, value in row.items() if name != "step"}, step)
        if self.write is not None:
            self.write(line(row))

    def row(self, step: int, result: StepResult, state: TrainState, *, lr: float, lam: float) -> dict[str, int | float]:
        """The original's columns (`l0` a fraction), then ours. Terms are those of the scaled inputs trained on."""
        sae, config = state.sae, self.config
        terms = {name: term.item() for name, term in result.terms.items()}
        l0 = result.n_active.item() / config.batch_size
        silent = dead_latents(
            state.last_fired, step + 1, batch_size=config.batch_size, dead_after=config.dead_after_vectors
        )
        norms = sae.W_dec.detach().norm(dim=1)
        return {
            "step": step,
            "loss": terms.pop("loss"),
            "mse": terms["mse"],
            "l1": terms.pop("l1", 0.0),
            "l0": l0 / sae.d_sae,
            "dead_features": int((state.last_fired < 0).sum()),
            "lr": lr,
            "lam": lam,
            "l0_count": l0,
            "fvu": terms.pop("mse") / (self.variance * state.input_scale**2),
            "dead": int(silent.sum()),
            "dense": int((result.fire_counts > DENSE_SHARE * config.batch_size).sum()),
            "grad_norm": result.grad_norm.item(),
            "decoder_norm_drift": sae.peers.max_latents((norms - 1).abs().max()).item(),
            # terms that not every step has keep their column
            **{name: terms.get(name, 0.0) for name in self._own_terms(sae, terms)},
        }

    def _own_terms(self, sae: torch.nn.Module, terms: dict[str, float]) -> list[str]:
        expected = ["auxk"] if self.config.revive == "auxk" else []
        return [*terms, *(name for name in expected if name not in terms)]

    def close(self) -> None:
        if self._tracker is not None:
            self._tracker.close()


def line(row: dict[str, int | float]) -> str:
    """A row for people."""
    return (
        f"step {row['step']}: loss={row['loss']:.4f} mse={row['mse']:.4f} l0={row['l0']:.4f}"
        f" dead={row['dead_features']} lr={row['lr']:.2e} lam={row['lam']:.2f}"
    )
