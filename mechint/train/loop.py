"""The training loop of the canonical SAE.

What one step does is in `mechint.kernels`; here is what surrounds it: which batch, which learning rate, what is logged,
when the state is saved, and what happens at Ctrl-C, SIGTERM or a loss that is not finite.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mechint.config import SAETrainConfig, layer_of_hook
from mechint.data.batches import make_batches, split_indices
from mechint.data.store import Activations, open_activations
from mechint.errors import MechintError
from mechint.eval.reconstruction import Activity, evaluate_sae
from mechint.eval.rows import append_metrics_row
from mechint.kernels import StepResult, dense_step
from mechint.provenance import detect_device, get_git_commit, set_global_seed, write_json
from mechint.runs import Run, write_run_manifest
from mechint.sae import SparseAutoEncoder, save_checkpoint, save_sae_folder
from mechint.train.layout import Layout, layout_of, make_layout
from mechint.train.schedule import l1_weight, learning_rate
from mechint.train.state import TrainState, load_state, save_state

# Seconds between refreshes of the progress bar: reading a loss off an accelerator makes it wait.
REFRESH_SECONDS = 0.5
# What is copied from the record of the activations into the SAE's own: an SAE is only valid on activations like these.
ACTIVATION_KEYS = (
    "model_name",
    "model_source",
    "model_revision",
    "model_sha256",
    "hook_name",
    "processing",
    "prepend_bos",
    "keep_bos",
    "context_size",
    "dataset_name",
)


class Stopped(KeyboardInterrupt):
    """Training was stopped by a signal; `command` goes on with it."""

    def __init__(self, command: str):
        super().__init__(command)
        self.command = command


def train(config: SAETrainConfig, *, progress: bool = True) -> Layout:
    """Train into a new run directory and return its layout. Every file of docs/run.md is there when this returns.

    Raises:
        MechintError: unusable settings or activations (before anything is written), a loss that is not finite, a
            full disk. After the latter two, `resume` goes on from the last saved state.
        Stopped: Ctrl-C or SIGTERM; the state is saved first.
    """
    activations = open_activations(config.activations_path)
    config = resolve(config, activations)
    activations.check_finite()
    splits = split_indices(activations, config.val_fraction, config.seed, config.split_by)
    layout = make_layout(config)
    # The legacy layout has no directory to name with --resume: the same command goes on with what it left behind.
    resumed = config.legacy_layout and layout.state.is_file()
    return _run(config, activations, splits, layout, resumed=resumed, progress=progress)


def resume(run_dir: str | Path, *, progress: bool = True) -> Layout:
    """Go on with a stopped run; on a CPU the result is bit for bit that of a run that never stopped."""
    run = Run(run_dir)
    if run.is_done:
        raise MechintError(f"{run.path} is finished: there is nothing to resume; start a new run for more steps")
    if not run.state_path.is_file():
        raise MechintError(f"{run.path} has no saved state to resume from: start the run again")
    activations = open_activations(run.activations_path())
    config = run.config
    splits = split_indices(activations, config.val_fraction, config.seed, config.split_by)
    return _run(config, activations, splits, layout_of(run), resumed=True, progress=progress)


def resolve(config: SAETrainConfig, activations: Activations) -> SAETrainConfig:
    """The config with what the activations record filled in; a contradiction between the two is a `MechintError`."""
    info, default = activations.info, SAETrainConfig()
    if activations.d_in != config.activation_dim:
        raise MechintError(
            f"{config.activations_path} holds vectors of width {activations.d_in}, but --activation-dim is"
            f" {config.activation_dim}: pass --activation-dim {activations.d_in}, or other activations"
        )
    filled: dict[str, Any] = {"device": detect_device(config.device)}
    for key in ("hook_name", "model_name", "model_source", "dataset_name", "dataset_split", "num_texts", "max_chars"):
        recorded = info.get("n_texts" if key == "num_texts" else key)
        if recorded is None:
            continue
        given = getattr(config, key)
        if key in ("hook_name", "model_name") and given not in (recorded, getattr(default, key)):
            flag = "--hook-name" if key == "hook_name" else "--model-name"
            raise MechintError(
                f"{config.activations_path} was collected with {key} {recorded!r}, but {flag} is {given!r}: leave the"
                " flag out, or collect other activations"
            )
        filled[key] = recorded
    hook_name = filled.get("hook_name", config.hook_name)
    filled["layer"] = layer if (layer := layer_of_hook(hook_name)) is not None else config.layer
    if config.split_by == "text" and activations.text_ids is None:
        filled["split_by"] = "row"  # an old .pt does not know its texts; the config that is written says what was done
    return config.with_overrides(**filled)


def _run(
    config: SAETrainConfig,
    activations: Activations,
    splits: tuple[torch.Tensor, torch.Tensor],
    layout: Layout,
    *,
    resumed: bool,
    progress: bool,
) -> Layout:
    started = time.perf_counter()
    assert config.device is not None, "resolve() fills the device"
    train_indices, val_indices = splits
    set_global_seed(config.seed)
    # Initial weights are drawn on the CPU, so that they do not depend on the device.
    sae = SparseAutoEncoder(config.activation_dim, config.expansion).to(config.device)
    sae.metadata = {
        "hook_name": config.hook_name,
        "model_name": config.model_name,
        "model_source": config.model_source,
        **{key: activations.info[key] for key in ACTIVATION_KEYS if activations.info.get(key) is not None},
        "activations_sha256": activations.sha256,
    }
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.learning_rate, fused=config.device in ("cpu", "cuda"))
    ever_active = torch.zeros(sae.d_sae, dtype=torch.bool, device=config.device)
    state = TrainState(sae, optimizer, ever_active)
    if resumed:
        load_state(state, layout.state, config=config.to_dict(), activations_sha256=activations.sha256)
        _cut(layout.metrics, state.metrics_size)
    write_json(layout.config, config.to_dict())
    _loop(config, activations, train_indices, state, layout, progress=progress)
    # From here on a kill costs only the evaluation: the last state is that of the last step.
    _save(state, layout, config, activations)
    save_checkpoint(sae, layout.checkpoint)
    if layout.sae_dir is not None:
        save_sae_folder(sae, layout.sae_dir)
    if layout.metadata is not None:
        write_json(layout.metadata, {"sae_metadata": sae.metadata})
    summary = _summary(config, activations, train_indices, val_indices, state, layout, started)
    write_json(layout.summary, summary)
    if layout.manifest is not None:
        write_run_manifest(
            layout.root,
            config,
            summary,
            inputs={"activations": _describe(activations, layout)},
            device=config.device,
            resumed_at=state.resumed_at,
        )
    layout.remove_state()
    return layout


def _loop(
    config: SAETrainConfig,
    activations: Activations,
    train_indices: torch.Tensor,
    state: TrainState,
    layout: Layout,
    *,
    progress: bool,
) -> None:
    batches = make_batches(config.batch_order, train_indices, config.batch_size, config.seed)
    log_every = config.log_every or max(config.steps // 10, 1)
    # What turns mse into the fraction of variance unexplained, for the log: variance per dimension of a sample.
    variance = _variance_per_dim(activations, train_indices)
    began, seconds_before = time.perf_counter(), state.training_seconds
    shown, shown_step = began, state.step

    def save() -> None:
        state.training_seconds = seconds_before + time.perf_counter() - began
        _save(state, layout, config, activations)

    if state.step == 0 and config.save_every:
        save()
    bar = tqdm(total=config.steps, initial=state.step, unit="step", desc="train", disable=not progress)
    with _stop_signals() as stop, bar:
        while state.step < config.steps:
            step = state.step
            lr = learning_rate(step, peak=config.learning_rate, warmup_steps=config.warmup_steps, steps=config.steps)
            lam = l1_weight(step, l1_lambda=config.l1_lambda, lambda_warmup_steps=config.lambda_warmup_steps)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            x = activations.rows(batches.indices(step)).to(config.device)
            result = dense_step(state.sae, state.optimizer, x, lam=lam, max_grad_norm=config.max_grad_norm)
            if not torch.isfinite(result.loss):
                raise MechintError(
                    f"the loss is {result.loss.item()} at step {step}: lower --learning-rate or --lam;"
                    f" the last good state is in {layout.state.parent}"
                )
            state.ever_active |= result.active
            state.step += 1
            bar.update()
            if step % log_every == 0 or state.step == config.steps:
                row = _metrics_row(step, result, state, lr=lr, lam=lam, variance=variance)
                append_metrics_row(layout.metrics, row)
                tqdm.write(_line(row)) if progress else print(_line(row))
            now = time.perf_counter()
            if progress and now - shown > REFRESH_SECONDS:
                rate = (state.step - shown_step) * config.batch_size / (now - shown)
                shown, shown_step = now, state.step
                bar.set_postfix_str(_status(result, state, rate))
            if stop.is_set():
                save()
                raise Stopped(_resume_command(config, layout))
            if config.save_every and state.step % config.save_every == 0 and state.step < config.steps:
                save()
    state.training_seconds = seconds_before + time.perf_counter() - began


def _resume_command(config: SAETrainConfig, layout: Layout) -> str:
    if config.legacy_layout:
        return "python train.py with the same flags"
    return f"python scripts/train_sae.py --resume {layout.root}"


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a step is never cut in half. A second Ctrl-C interrupts at once.

    Only the main thread may handle signals; elsewhere (a notebook's worker, a job queue) the event stays unset.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_signal(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _metrics_row(
    step: int, result: StepResult, state: TrainState, *, lr: float, lam: float, variance: float
) -> dict[str, int | float]:
    """A row of metrics.csv: the batch before this step's update. `l0` is the fraction active, as always there."""
    l0_fraction = (result.feature_acts > 0).float().mean().item()
    mse = result.mse.item()
    return {
        "step": step,
        "loss": result.loss.item(),
        "mse": mse,
        "l1": result.l1.item(),
        "l0": l0_fraction,
        "dead_features": int((~state.ever_active).sum()),
        "lr": lr,
        "lam": lam,
        "l0_count": l0_fraction * state.sae.d_sae,
        "fvu": mse / variance,
    }


def _line(row: dict[str, int | float]) -> str:
    return (
        f"step {row['step']}: loss={row['loss']:.4f} mse={row['mse']:.4f} l0={row['l0']:.4f}"
        f" dead={row['dead_features']} lr={row['lr']:.2e} lam={row['lam']:.2f}"
    )


def _status(result: StepResult, state: TrainState, rate: float) -> str:
    l0 = (result.feature_acts > 0).sum().item() / len(result.feature_acts)
    dead = int((~state.ever_active).sum())
    return f"loss {result.loss.item():.4f}, L0 {l0:.1f}, dead {dead}, {rate:,.0f} vectors/s"


def _variance_per_dim(activations: Activations, indices: torch.Tensor, sample: int = 8192) -> float:
    """Mean over d_in of the variance of an evenly spaced sample of the training rows (for the log's fvu only)."""
    picked = indices[torch.linspace(0, len(indices) - 1, min(sample, len(indices))).long()]
    return max(activations.rows(picked).var(dim=0, correction=0).mean().item(), 1e-30)


def _save(state: TrainState, layout: Layout, config: SAETrainConfig, activations: Activations) -> None:
    state.metrics_size = layout.metrics.stat().st_size if layout.metrics.is_file() else 0
    save_state(state, layout.state, config=config.to_dict(), activations_sha256=activations.sha256)


def _cut(path: Path, size: int) -> None:
    """Remove what was written behind the first `size` bytes: rows of steps that will be done again."""
    if path.is_file() and path.stat().st_size > size:
        os.truncate(path, size)


def _summary(
    config: SAETrainConfig,
    activations: Activations,
    train_indices: torch.Tensor,
    val_indices: torch.Tensor,
    state: TrainState,
    layout: Layout,
    started: float,
) -> dict[str, Any]:
    """summary.json: the original's keys, and the newer metrics. Paths are relative to the run directory."""
    sae = state.sae
    n_dead = int((~state.ever_active).sum())
    in_run = layout.manifest is not None
    summary: dict[str, Any] = {
        "val_mse": None,
        "val_l0": None,
        "checkpoint_path": layout.checkpoint.name if in_run else str(layout.checkpoint),
        "config_path": layout.config.name if in_run else str(layout.config),
        "run_dir": "." if in_run else layout.label,
        "git_commit": get_git_commit(),
        "num_features": sae.d_sae,
        "num_params": sae.num_params,
        "training_seconds": state.training_seconds,
        "n_train": len(train_indices),
        "n_val": len(val_indices),
    }
    if len(val_indices):
        # "dead" in a summary means: in no batch of the training (docs/metrics.md)
        seen = Activity(state.ever_active.long().cpu(), torch.zeros(sae.d_in, dtype=torch.float64), len(train_indices))
        summary |= evaluate_sae(sae, activations, val_indices, batch_size=config.eval_batch_size, activity=seen)
    summary |= {"dead_features": n_dead, "dead_fraction": n_dead / sae.d_sae}
    summary["total_seconds"] = time.perf_counter() - started
    return summary


def _describe(activations: Activations, layout: Layout) -> dict[str, Any]:
    """The activations' place and hashes, for the manifest: text -> activations -> weights, by hash."""
    info = activations.info
    return {
        "path": os.path.relpath(activations.path, layout.root),
        "sha256": activations.sha256,
        "n_rows": activations.n_rows,
        **{key: info.get(key) for key in ("dataset_name", "dataset_revision", "texts_sha256")},
        **{key: info.get(key) for key in ("model_source", "model_revision", "model_sha256")},
    }
