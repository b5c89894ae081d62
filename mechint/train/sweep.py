"""A sweep: one SAE for each point of a grid, trained side by side into run directories of their own, and their table.

`start` and `resume` open a sweep's folder, `train_members` trains some or all of its members in this process,
`conclude` measures the cross-entropy and writes the table once all of them are done or have failed. Several processes
(torchrun's ranks, a cluster's jobs) each train a share; they never wait for each other: all that they share is the
folder, and the one that finds every member finished writes the table.
"""

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mechint.config import EvalConfig, SAETrainConfig, SweepConfig
from mechint.data.store import Activations, open_activations
from mechint.errors import MechintError
from mechint.eval.checkpoint import prepare_language
from mechint.eval.language import language_metrics_of
from mechint.eval.reconstruction import row_batches
from mechint.provenance import read_json, timestamp_slug, write_json
from mechint.runs import Run
from mechint.sae import load_sae
from mechint.train.resolve import resolve, split
from mechint.train.signals import Stopped, stop_signals
from mechint.train.sweep_grid import plan_members, split_key
from mechint.train.sweep_loop import Crew
from mechint.train.sweep_record import (
    FAILED_JSON,
    LANGUAGE_JSON,
    LOCKS,
    Member,
    Sweep,
    make_sweep,
    open_sweep,
    results,
    write_results,
    write_sweep,
)

# SAEs that are spliced into the model in one pass over the texts.
SPLICED_AT_ONCE = 16


def start(config: SweepConfig) -> tuple[Sweep, Activations]:
    """Check every member, then make the folder of a new sweep.

    Raises:
        MechintError: an empty grid, a member that cannot be trained as asked, unusable activations, a name that is
            taken. Nothing is written then.
    """
    file = {} if config.config is None else read_json(config.config, "config file")
    settings = config.base_settings(file)
    activations = open_activations(settings["activations_path"])
    if "activation_dim" not in file and "d_in" not in file:
        settings["activation_dim"] = activations.d_in
    base = SAETrainConfig.from_dict(settings)
    name = config.name or f"sweep-{timestamp_slug()}"
    path = Path(config.runs_root) / name
    plans = plan_members(config, base, activations, str(path))
    activations.check_finite()
    info = {
        "name": name,
        "grid": config.grid,
        "base": resolve(base, activations).to_dict(),
        "activations": {"path": str(activations.path), "sha256": activations.sha256, "n_rows": activations.n_rows},
        "eval_texts": config.eval_texts,
    }
    return make_sweep(path, plans, info), activations


def resume(path: Path) -> tuple[Sweep, Activations]:
    """Open a sweep to go on with it; members that failed are to be tried again.

    Raises:
        MechintError: no sweep, or its activations have changed.
    """
    sweep = open_sweep(path)
    for member in sweep.members:
        if member.status == "failed":
            (member.path / FAILED_JSON).unlink(missing_ok=True)
    return sweep, activations_of(sweep)


def activations_of(sweep: Sweep) -> Activations:
    """The activations of a sweep. Raises `MechintError` if they are not those that it began with."""
    activations = open_activations(sweep.info["base"]["activations_path"])
    activations.verify()
    recorded = sweep.info["activations"]["sha256"]
    if activations.sha256 != recorded:
        raise MechintError(
            f"{activations.path} has changed since the sweep began (sha256 {recorded[:12]}, now"
            f" {activations.sha256[:12]}): restore it, or start a new sweep"
        )
    return activations


def train_members(
    sweep: Sweep, names: Sequence[str], activations: Activations, *, progress: bool = True, n_threads: int | None = None
) -> None:
    """Train the members with these names that are not done, side by side, in this process.

    A member that fails is recorded and leaves the others alone.

    Raises:
        Stopped: Ctrl-C or SIGTERM; the states of all members are saved first.
    """
    members = [member for member in sweep.unfinished if member.name in names]
    if not members:
        return
    threads = torch.get_num_threads()
    say = tqdm.write if progress else print

    def report(member: Member) -> None:
        write_sweep(sweep)
        say(_line(member))

    with stop_signals() as stop:
        crew = Crew(members, activations, stop=stop, report=report, n_threads=n_threads)
        for member in crew.elsewhere:
            say(f"{member.name}: another process is training it; left to that one")
        steps = sum(running.member.config.steps for running in crew.running)
        with tqdm(total=steps, unit="step", desc=f"{len(members)} members", disable=not progress) as bar:
            bar.update(sum(running.step for running in crew.running))
            bar.unpause()
            workers = crew.start()
            while any(worker.is_alive() for worker in workers):
                for worker in workers:
                    worker.join(timeout=0.1)
                bar.update(sum(running.step for running in crew.running) - bar.n)
        torch.set_num_threads(threads)  # threads made from now on would take over the workers' number
        if stop.is_set():
            crew.save_all()
            write_sweep(sweep)
            if any(member.status in ("unfinished", "waiting") for member in members):
                raise Stopped(sweep.resume_command)


def _line(member: Member) -> str:
    """What came of a member, for people."""
    if member.status != "done":
        return f"{member.name}: failed: {member.error}"
    summary = Run(member.path).summary
    if summary.get("l0") is None:
        return f"{member.name}: done (nothing was held out to measure it on)"
    fvu = "none" if summary["fvu"] is None else f"{summary['fvu']:.4f}"
    return f"{member.name}: L0 {summary['l0']:.1f}, FVU {fvu}, dead {summary['dead_features']}"


def conclude(sweep: Sweep, activations: Activations, *, progress: bool = True) -> list[dict[str, Any]] | None:
    """The table, written as results.csv, if every member is done or has failed; else None.

    Before that the cross-entropy of the members is measured on held-out texts, where the model can be had; why it could
    not be is in sweep.json under `notes`.
    """
    if sweep.unfinished:
        write_sweep(sweep)
        return None
    notes = measure_language(sweep, activations, progress=progress)
    sweep.info["notes"] = notes
    rows = results(sweep)
    write_results(sweep, rows)
    write_sweep(sweep)
    shutil.rmtree(sweep.path / LOCKS, ignore_errors=True)
    return rows


def measure_language(sweep: Sweep, activations: Activations, *, progress: bool = True) -> list[str]:
    """Write language.json of each finished member that has none yet; returns why it was left out, where it was."""
    if sweep.info["eval_texts"] == 0:
        return ["cross-entropy left out (--eval-texts 0)"]
    groups: dict[tuple, list[Member]] = {}
    for member in sweep.members:
        if member.status == "done" and not (member.path / LANGUAGE_JSON).is_file():
            groups.setdefault(split_key(member.config), []).append(member)
    notes: list[str] = []
    for members in groups.values():
        note = _measure_group(members, activations, sweep.info["eval_texts"], progress)
        if note is not None and note not in notes:
            notes.append(note)
    return notes


def _measure_group(members: list[Member], activations: Activations, n_texts: int, progress: bool) -> str | None:
    """Members that hold out the same rows, on the texts of those rows."""
    first = members[0]
    train_indices, val_indices = split(first.config, activations)
    if len(val_indices) == 0:
        return "cross-entropy left out: nothing was held out (val_fraction 0)"
    if activations.tokens is None:
        return f"cross-entropy left out: {activations.path} was stored without its tokens"
    device = str(first.config.device)
    asked = EvalConfig(run_dir=first.path, max_eval_texts=n_texts, device=device)
    checkpoints = [member.layout.checkpoint for member in members]
    with warnings.catch_warnings():  # activations that do not say how they were made have no tokens either
        warnings.simplefilter("ignore")
        sae = load_sae(checkpoints[0], device=device)
    spliced, notes = prepare_language(asked, checkpoints[0], sae, activations, val_indices, None)
    note = "; ".join(notes) or None
    if spliced is None:
        return note
    inside, texts = spliced
    total, n_rows = torch.zeros(activations.d_in, dtype=torch.float64), 0
    for x in row_batches(activations, train_indices, first.config.eval_batch_size):
        total += x.double().sum(dim=0)
        n_rows += len(x)
    mean = (total / n_rows).float()
    for begin in range(0, len(members), SPLICED_AT_ONCE):
        part = slice(begin, begin + SPLICED_AT_ONCE)
        saes = [load_sae(path, device=device) for path in checkpoints[part]]
        found = language_metrics_of(saes, inside.model, texts, mean, inside.hook_name, progress=progress)
        for member, values in zip(members[part], found, strict=True):
            write_json(member.path / LANGUAGE_JSON, {**values, "model_name": inside.model.name})
    return note
