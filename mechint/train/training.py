"""One SAE in training: making it, one step of it, its log, its saved state, and the files that it leaves.

`mechint.train.loop` drives one of these; a sweep drives several over the same batches.
"""

import math
import os
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.config import SAETrainConfig
from mechint.data.batches import BatchOrder, make_batches
from mechint.data.norms import outliers
from mechint.data.source import Live
from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.eval.reconstruction import Activity, evaluate_rows, without_outliers
from mechint.formats.saelens import save_folder
from mechint.kernels import Kernel, StepResult, StepSettings, make_kernel
from mechint.provenance import get_git_commit, set_global_seed, write_json
from mechint.runs import write_manifest
from mechint.sae import SAE, Objective, build_sae, save_checkpoint
from mechint.sae.init import centre, fit_encoder, input_scale, set_density, tie_encoder
from mechint.train.dead import dead_latents, resample
from mechint.train.layout import Layout
from mechint.train.live import first_rows
from mechint.train.log import MetricsLog
from mechint.train.parallel import Team
from mechint.train.schedule import learning_rate_at, penalty_weight, sparsity_at
from mechint.train.state import TrainState, load_state, save_state
from mechint.train.team import describe

# Training rows, evenly spaced, that decide where training starts and how inputs are scaled.
SAMPLE_ROWS = 65_536
# Steps whose losses are looked at together, by device: reading one makes this process wait for the GPU. A loss that is
# not finite moves no weight, so what is found some steps late has done no harm.
READ_EVERY = {"cuda": 50}
# Tokens that a summary names of the rows that were left out.
TOKENS_NAMED = 10
# Metrics of an evaluation that need each latent's number of firings.
OF_FREQUENCY = ("dense_features", "dense_fraction", "features_over_1_percent")
# What the SAE's own record says of the activations it was trained on, as it is only valid on such: what the config has,
# and what only the activations can say. What nobody knows is left out.
IDENTITY_KEYS = ("model_name", "model_source", "hook_name", "processing", "prepend_bos", "dataset_name")
ACTIVATION_KEYS = ("model_revision", "model_sha256", "tokenizer_sha256", "d_vocab", "dtype", "keep_bos", "context_size")


class Unread(NamedTuple):
    """What a step left on the device."""

    step: int
    lr: float
    loss: Tensor
    n_active: Tensor


@dataclass
class Training:
    """A training between two steps. Everything that changes is in `state` (and on disk)."""

    config: SAETrainConfig
    layout: Layout
    activations: Activations
    train_indices: Int[Tensor, " n_train"]
    val_indices: Int[Tensor, " n_val"]
    state: TrainState
    kernel: Kernel
    batches: BatchOrder
    log: MetricsLog
    team: Team = field(default_factory=Team)
    live: Live | None = None
    started: float = field(default_factory=time.perf_counter)
    seconds_before: float = 0.0  # of training, before this process took it up
    unread: list[Unread] = field(default_factory=list)  # of steps that nobody has looked at yet

    @property
    def is_done(self) -> bool:
        return self.state.step >= self.config.steps


def prepare(
    config: SAETrainConfig,
    activations: Activations,
    splits: tuple[Int[Tensor, " n_train"], Int[Tensor, " n_val"]],
    layout: Layout,
    *,
    resumed: bool,
    team: Team | None = None,
    live: Live | None = None,
) -> Training:
    """A training at its first step, or where its saved state left it; config.json is written.

    Args:
        team: the processes that train this SAE together, all of which call this; one alone if not given.
        live: where rows come from, if not from `activations`, which are then the held-out ones.
    """
    team = team or Team()
    assert config.device is not None, "resolve() fills the device"
    sae = make_sae(config, activations, team)
    optimizer = make_optimizer(sae, config)
    state = TrainState(sae, optimizer, torch.full((sae.d_sae,), -1, device=config.device))
    if resumed:
        known = {"config": config.to_dict(), "activations_sha256": activations.sha256}
        team.load(state, lambda whole: load_state(whole, layout.state, **known))
        if team.writes and layout.metrics.is_file() and layout.metrics.stat().st_size > state.metrics_size:
            os.truncate(layout.metrics, state.metrics_size)  # rows of steps that will be done again
        if live is not None and state.source is not None:
            live.seek(state.source)
    if not resumed or state.variance is None:
        n_rows = 8192 if resumed else SAMPLE_ROWS
        sample = _sample(activations, splits[0], n_rows) if live is None else first_rows(live, config, n_rows)
        if not resumed:
            state.input_scale = initialise(sae, config, sample)
        state.variance = sample[:: max(1, len(sample) // 8192)][:8192].var(dim=0, correction=0).mean().item()
    team.check(state)
    if team.writes:
        write_json(layout.config, config.to_dict())
    return Training(
        config,
        layout,
        activations,
        *splits,
        state,
        team.kernel(
            sae,
            config.kernel,
            lambda name: make_kernel(
                sae, optimizer, kernel=name, project_gradient=config.project_gradient, precision=config.precision
            ),
        ),
        make_batches(config.batch_order, splits[0], config.batch_size, config.seed),
        MetricsLog(config, layout.metrics, variance=max(state.variance, 1e-30), writes=team.writes),
        team,
        live,
        seconds_before=state.training_seconds,
    )


def make_sae(config: SAETrainConfig, activations: Activations, team: Team) -> SAE:
    """The SAE that the config asks for, with initial weights drawn on the CPU, whatever device it goes to."""
    set_global_seed(config.seed)
    shape, options = (config.architecture, config.activation_dim, config.num_features), config.architecture_options
    sae = team.build(lambda: build_sae(*shape, options=options)).to(config.device)
    sae.unit_decoder = config.decoder == "unit"
    sae.metadata = {
        **{key: value for key in IDENTITY_KEYS if (value := getattr(config, key)) is not None},
        **{key: activations.info[key] for key in ACTIVATION_KEYS if activations.info.get(key) is not None},
        "activations_sha256": activations.sha256,
    }
    return sae


def make_optimizer(sae: SAE, config: SAETrainConfig) -> torch.optim.Adam:
    """Adam, fused where torch has it."""
    return torch.optim.Adam(
        sae.parameters(),
        lr=config.peak_learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        fused=str(config.device).split(":")[0] in ("cpu", "cuda"),
    )


def initialise(sae: SAE, config: SAETrainConfig, sample: Float[Tensor, "n d_in"]) -> float:
    """Set the start that the config asks for from a sample of the training rows; returns the input scale."""
    scale = input_scale(sample, config.normalize_inputs)
    sample = (sample * scale).to(sae.W_enc.device)
    if config.init in ("tied", "fitted"):
        tie_encoder(sae, config.init_decoder_norm)
    elif config.init_decoder_norm != 1.0:
        sae.W_dec.data.mul_(config.init_decoder_norm)
    sae.b_dec.data.copy_(centre(sample, config.b_dec_init))
    if config.init_l0 is not None:
        set_density(sae, sample, config.init_l0)
    if config.init == "fitted":
        fit_encoder(sae, sample[:: max(1, len(sample) // 4096)])
    return scale


def advance(training: Training, x: Float[Tensor, "batch d_in"]) -> StepResult:
    """One step on the batch `x` (as stored, not yet scaled; of several processes, each gives the rows that are its),
    and its row in the log if one is due.

    Raises:
        MechintError: the loss of this step, or on a GPU of one of the last `READ_EVERY`, is not finite; the weights are
            then those of the last step whose loss was.
    """
    config, state = training.config, training.state
    step = state.step
    if state.input_scale != 1.0:
        x = x * state.input_scale
    lr, lam = learning_rate_at(config, step), sparsity_at(config, step) * math.exp(state.steering.log_weight)
    objective = make_objective(training, lam)
    resampling_due = config.revive == "resample" and _resampling_due(config, step)
    result = training.kernel.step(x, StepSettings(lr, config.max_grad_norm, objective))
    # a copy: a GPU's graph writes to the same place each step
    training.unread.append(Unread(step, lr, result.terms["loss"].detach().clone(), result.n_active))
    if len(training.unread) >= READ_EVERY.get(x.device.type, 1) or step + 1 == config.steps:
        read(training)
    state.last_fired[result.fire_counts > 0] = step
    if resampling_due:
        resample(state.sae, state.optimizer, _dead(training, step + 1), x, seed=config.seed, step=step)
    state.step += 1
    training.log.add(step, result, state, lr=lr, lam=lam)
    return result


def read(training: Training) -> None:
    """Look at the losses since the last look, and at the L0s where they steer the penalty. Raises `MechintError` if a
    loss is not finite."""
    unread, training.unread = training.unread, []
    if not unread:
        return
    config = training.config
    for one, loss in zip(unread, torch.stack([one.loss for one in unread]).tolist(), strict=True):
        if not math.isfinite(loss):
            raise MechintError(
                f"the loss is {loss} at step {one.step}: lower --learning-rate or --lam;"
                f" the last good state is in {training.layout.state.parent}"
            )
    if config.steers_l0:
        for one, n_active in zip(unread, torch.stack([one.n_active for one in unread]).tolist(), strict=True):
            training.state.steering.look(config, n_active / config.batch_size, step=one.step, lr=one.lr)


def make_objective(training: Training, lam: float) -> Objective:
    """What the current step minimises."""
    config, state = training.config, training.state
    sae, step = state.sae, state.step
    wants_dead = config.revive == "auxk" or sae.wants_dead
    return Objective(
        sparsity=penalty_weight(config, lam, has_l1=sae.has_l1),
        dead=_dead(training, step) if wants_dead else None,
        k_aux=config.k_aux or max(1, sae.d_in // 2),
        aux_coefficient=config.aux_coefficient if config.revive == "auxk" else 0.0,
        widths=sae.step_widths(config.seed, step),
    )


def _dead(training: Training, step: int) -> Tensor:
    config = training.config
    return dead_latents(
        training.state.last_fired, step, batch_size=config.batch_size, dead_after=config.dead_after_vectors
    )


def _resampling_due(config: SAETrainConfig, step: int) -> bool:
    every = max(1, config.steps_of(config.resample_every))
    return (step + 1) % every == 0 and step + 1 <= config.steps // 2


def save(training: Training) -> None:
    """Write the state that a stopped run goes on from. Raises `MechintError` rather than save after a bad loss."""
    read(training)
    state, layout = training.state, training.layout
    state.training_seconds = training.seconds_before + time.perf_counter() - training.started
    state.source = None if training.live is None else training.live.position
    state.metrics_size = layout.metrics.stat().st_size if layout.metrics.is_file() else 0
    training.team.check(state)
    write_state(training, training.team.whole(state))


def write_state(training: Training, state: TrainState | None) -> None:
    """Write a state that is whole; None where another process does."""
    if state is not None:
        known = {"config": training.config.to_dict(), "activations_sha256": training.activations.sha256}
        save_state(state, training.layout.state, **known)


def finish(training: Training) -> dict[str, Any]:
    """Evaluate, and write what docs/run.md says a finished run holds; the manifest is last. Returns the summary,
    which is empty on a process that is not the one that writes."""
    config, state, layout = training.config, training.state, training.layout
    # From here on a kill costs only the evaluation: the last state is that of the last step.
    save(training)
    training.log.close()
    state = training.team.whole(state)
    if state is None:
        return {}
    training.team.release()
    sae = state.sae.saved_form(state.input_scale)
    save_checkpoint(sae, layout.checkpoint)
    if layout.sae_dir is not None:
        save_folder(sae, layout.sae_dir)
    if layout.metadata is not None:
        write_json(layout.metadata, {"sae_metadata": sae.metadata})
    summary = _summary(training, sae)
    write_json(layout.summary, summary)
    if layout.manifest is not None:
        write_manifest(
            layout.root,
            config,
            summary,
            inputs={"activations": _describe(config, training.activations, layout)},
            device=config.device,
            kernel=training.kernel.name,
            resumed_at=state.resumed_at,
            **describe(training.team),
        )
    layout.remove_state()
    return summary


def _sample(activations: Activations, indices: Int[Tensor, " n"], count: int) -> Float[Tensor, "rows d_in"]:
    """Evenly spaced training rows."""
    return activations.rows(indices[torch.linspace(0, len(indices) - 1, min(count, len(indices))).long()]).float()


def _summary(training: Training, sae: SAE) -> dict[str, Any]:
    """summary.json: the original's keys, and the newer metrics. Paths are relative to the run directory."""
    config, state, layout = training.config, training.state, training.layout
    fired = state.last_fired >= 0
    n_dead = int((~fired).sum())
    in_run = layout.manifest is not None
    summary: dict[str, Any] = {
        "val_mse": None,
        "val_l0": None,
        "checkpoint_path": layout.checkpoint.name if in_run else str(layout.checkpoint),
        "config_path": layout.config.name if in_run else str(layout.config),
        "run_dir": "." if in_run else layout.label,
        "git_commit": get_git_commit(),
        "architecture": config.architecture,
        "num_features": sae.d_sae,
        "num_params": sae.num_params,
        "training_seconds": state.training_seconds,
        "n_train": len(training.train_indices),
        "n_val": len(training.val_indices),
    }
    if len(training.val_indices):
        # "dead" in a summary means: in no batch of the training (docs/metrics.md)
        seen = Activity(fired.long().cpu(), torch.zeros(sae.d_in, dtype=torch.float64), len(training.train_indices))
        summary |= evaluate_rows(
            sae,
            training.activations,
            training.val_indices,
            batch_size=config.eval_batch_size,
            device=training.team.evaluates_on(config.device, sae),
            activity=seen,
        )
        if config.max_norm_multiple:
            typical = without_outliers(
                sae,
                training.activations,
                training.val_indices,
                multiple=config.max_norm_multiple,
                batch_size=config.eval_batch_size,
            )
            summary |= {} if typical is None else {"without_outliers": typical}
        # how often each fires is not counted in training; `mechint eval` does
        summary = {key: value for key, value in summary.items() if key not in OF_FREQUENCY}
    if config.max_norm_multiple:
        summary["left_out"] = _left_out(training)
    if training.live is not None:
        summary["n_train"] = config.steps * config.batch_size
    summary |= {"dead_features": n_dead, "dead_fraction": n_dead / sae.d_sae}
    summary["total_seconds"] = training.seconds_before + time.perf_counter() - training.started
    return summary


def _left_out(training: Training) -> dict[str, Any]:
    """How many training rows were left out for their norm, above which, and what tokens they are most often."""
    activations, multiple = training.activations, training.config.max_norm_multiple
    if training.live is not None:
        limit, counted = training.live.norm_limit, training.live.left_out
        most = dict(sorted(counted.items(), key=lambda item: -item[1])[:TOKENS_NAMED])
        return {"n_rows": sum(counted.values()), "multiple": multiple, "norm_limit": limit, "tokens": most}
    limit, is_outlier = outliers(activations.norms, multiple)
    is_outlier[training.val_indices] = False
    tokens: dict[str, int] = {}
    if activations.tokens is not None:
        found, counts = activations.tokens[is_outlier].unique(return_counts=True)
        for place in counts.argsort(descending=True, stable=True)[:TOKENS_NAMED].tolist():
            tokens[str(int(found[place]))] = int(counts[place])
    return {"n_rows": int(is_outlier.sum()), "multiple": multiple, "norm_limit": limit, "tokens": tokens}


def _describe(config: SAETrainConfig, activations: Activations, layout: Layout) -> dict[str, Any]:
    """The activations' place and hashes, for the manifest: text -> activations -> weights, by hash."""
    info = activations.info
    return {
        **({"assumed": info["assumed"]} if "assumed" in info else {}),
        "path": os.path.relpath(activations.path, layout.root),
        "sha256": activations.sha256,
        "n_rows": activations.n_rows,
        **({"live": config.live} if config.live is not None else {}),
        **{key: info.get(key) for key in ("dataset_name", "dataset_revision", "texts_sha256")},
        **{key: info.get(key) for key in ("model_source", "model_revision", "model_sha256")},
    }
