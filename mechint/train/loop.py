"""The training loop: which batch comes next, when the state is saved, and what happens at Ctrl-C or SIGTERM.

What one step does is in `mechint.kernels`, what surrounds it for one SAE in `mechint.train.training`.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mechint.config import SAETrainConfig
from mechint.data.ranks import launcher
from mechint.data.store import open_activations
from mechint.data.watch import RankLost
from mechint.errors import MechintError
from mechint.kernels import StepResult
from mechint.provenance import detect_device
from mechint.runs import Run
from mechint.train.feed import Feed
from mechint.train.layout import Layout, layout_of, legacy_layout, make_layout, run_layout
from mechint.train.live import described, hold_out, open_live, with_held_out
from mechint.train.parallel import Team
from mechint.train.plan import check_memory
from mechint.train.resolve import check_architecture, resolve, split
from mechint.train.signals import Stopped, stop_signals
from mechint.train.state import has_state
from mechint.train.team import join, make_team
from mechint.train.training import Training, advance, finish, prepare, save, write_state

# Seconds between refreshes of the progress bar: reading a loss off an accelerator makes it wait.
REFRESH_SECONDS = 0.5
# Seconds that saving may take when another process is gone.
RESCUE_SECONDS = 300.0


def train(config: SAETrainConfig, *, progress: bool = True) -> Layout:
    """Train into a new run directory and return its layout. Every file of docs/run.md is there when this returns.

    Under `torchrun` all its processes call this and share the work; the first of them writes.

    Raises:
        MechintError: unusable settings or activations (before anything is written), a loss that is not finite, a
            full disk, too little memory, another process that is gone. After the latter four, `resume` goes on from the
            last saved state.
        Stopped: Ctrl-C or SIGTERM; the state is saved first.
    """
    if config.live is not None:
        return _train_live(config, progress=progress)
    with join() as ranks:
        activations = open_activations(config.activations_path)
        config = resolve(config, activations)
        activations.check_finite()
        splits = split(config, activations)
        check_architecture(config)
        check_memory(config, activations)
        team = make_team(ranks, config)
        layout, resumed = _common_layout(team, config)
        with out_of_memory(config):
            return run(prepare(config, activations, splits, layout, resumed=resumed, team=team), progress=progress)


def _train_live(config: SAETrainConfig, *, progress: bool) -> Layout:
    """`train` with the rows of a model that runs beside it."""
    config = with_held_out(SAETrainConfig.from_dict({**config.to_dict(), "device": detect_device(config.device)}))
    live = open_live(config)
    with contextlib.closing(live), out_of_memory(config):
        config = described(config, live)
        check_architecture(config)
        layout = make_layout(config)
        activations = hold_out(live, config, layout, progress=progress)
        texts = config.num_texts
        config = resolve(config.with_overrides(activations_path=str(activations.path)), activations)
        config = config.with_overrides(num_texts=texts)
        check_memory(config, activations, held=live.nbytes)
        splits = split(config, activations)
        return run(prepare(config, activations, splits, layout, resumed=False, live=live), progress=progress)


def resume(run_dir: str | Path, *, progress: bool = True) -> Layout:
    """Go on with a stopped run; on a CPU the result is bit for bit that of a run that never stopped."""
    with join() as ranks:
        stopped = Run(run_dir)
        if stopped.is_done:
            raise MechintError(
                f"{stopped.path} is finished: there is nothing to resume; start a new run for more steps"
            )
        if not has_state(stopped.state_path):
            raise MechintError(f"{stopped.path} has no saved state to resume from: start the run again")
        activations = open_activations(stopped.activations_path())
        activations.verify()
        config = stopped.config
        team = make_team(ranks, config, resumed=True)
        with out_of_memory(config), contextlib.ExitStack() as held:
            live = None if config.live is None else held.enter_context(contextlib.closing(open_live(config)))
            splits = split(config, activations)
            training = prepare(config, activations, splits, layout_of(stopped), resumed=True, team=team, live=live)
            return run(training, progress=progress)


def _common_layout(team: Team, config: SAETrainConfig) -> tuple[Layout, bool]:
    """The layout that one process makes for all, and whether it holds a training to go on with."""
    if team.writes:
        layout = make_layout(config)
        # The legacy layout has no directory to name with --resume: the same command goes on with what it left behind.
        resumed = config.legacy_layout and has_state(layout.state)
        team.ranks.tell(json.dumps([str(layout.root), resumed]))
        return layout, resumed
    root, resumed = json.loads(team.ranks.tell(None))
    return legacy_layout(config) if config.legacy_layout else run_layout(Path(root)), resumed


def run(training: Training, *, progress: bool = True) -> Layout:
    """All steps that are left, then the files of a finished run."""
    team = training.team
    if team.ranks.watch is not None:
        team.ranks.watch.advice = f"to go on from the last saved state: {resume_command(training)}"
    try:
        steps(training, progress=progress and team.writes)
        finish(training)
        team.ranks.barrier()  # the files are there when this returns, on every process
    except RankLost as lost:
        if training.is_done and team.writes:  # they are: who is gone is missed no more
            return training.layout
        raise RankLost(f"{lost}; {rescue(training)}: {resume_command(training)}") from lost
    return training.layout


def steps(training: Training, *, progress: bool) -> None:
    """All steps that are left. Several processes stop after the same one, whichever of them was asked to."""
    config, state, team = training.config, training.state, training.team
    assert config.device is not None
    if state.step == 0 and config.save_every:
        save(training)
    bar = tqdm(total=config.steps, initial=state.step, unit="step", desc="train", disable=not progress)
    training.log.write = tqdm.write if progress else print
    next_rows = reader(training)
    shown, shown_step = time.perf_counter(), state.step
    with stop_signals() as team.stop_asked, bar:
        while not training.is_done:
            result = advance(training, next_rows())
            bar.update()
            now = time.perf_counter()
            if progress and now - shown > REFRESH_SECONDS:
                rate = (state.step - shown_step) * config.batch_size / (now - shown)
                shown, shown_step = now, state.step
                bar.set_postfix_str(status(result, training, rate))
            if team.stops:
                save(training)
                team.ranks.barrier()
                raise Stopped(resume_command(training))
            if config.save_every and state.step % config.save_every == 0 and not training.is_done:
                save(training)


def reader(training: Training) -> Callable[[], Tensor]:
    """What gives the rows of the next step, on the device that trains."""
    config, state, team, live = training.config, training.state, training.team, training.live
    assert config.device is not None
    if live is not None:
        (hook,) = live.hook_names
        return lambda: live.next_batch().activations[hook].to(config.device)
    feed = Feed(training.activations, config.device)
    return lambda: feed.rows(team.deal(training.batches.indices(state.step)))


def rescue(training: Training) -> str:
    """Save what can be saved when another process is gone; says what there is to go on from."""
    team = training.team
    if not team.can_rescue() or training.is_done:
        return "to go on from the last saved state"
    assert team.ranks.watch is not None
    team.ranks.watch.grace = RESCUE_SECONDS
    write_state(training, training.state)  # between two updates, all weights are here
    return f"the state of step {training.state.step} is saved; to go on"


def resume_command(training: Training) -> str:
    """What goes on with a stopped training."""
    if training.config.legacy_layout:
        return f"{launcher('train.py')} with the same flags"
    return f"{launcher('scripts/train_sae.py')} --resume {training.layout.root}"


def status(result: StepResult, training: Training, rate: float) -> str:
    """The end of the progress bar."""
    l0 = result.n_active.item() / training.config.batch_size
    never = int((training.state.last_fired < 0).sum())
    return f"loss {result.terms['loss'].item():.4f}, L0 {l0:.1f}, dead {never}, {rate:,.0f} vectors/s"


@contextmanager
def out_of_memory(config: SAETrainConfig) -> Iterator[None]:
    """Turn "no memory left", as torch says it on each device, into what to change."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            words = str(error).lower()
            if (
                "out of memory" not in words
                and "can't allocate memory" not in words
                and "not enough memory" not in words
            ):
                raise
        name, width = config.width_setting
        raise MechintError(
            f"out of memory with {config.batch_size} vectors a step and {config.num_features} latents: lower"
            f" --batch-size (now {config.batch_size}) or --{name.replace('_', '-')} (now {width})"
        ) from error
