"""`mechint sweep`, `scripts/sweep.py`: train a grid of SAEs over one reading of the activations."""

import sys
from collections.abc import Sequence
from typing import Any

from mechint.cli.flags import command, parse
from mechint.config import SweepConfig
from mechint.errors import MechintError

# Column of results.csv -> heading and format in the printed table.
SHOWN = {
    "l0": ("L0", "{:.1f}"),
    "fvu": ("FVU", "{:.4f}"),
    "ce_recovered_mean": ("CE rec.", "{:.4f}"),
    "dead_features": ("dead", "{}"),
    "training_seconds": ("seconds", "{:.0f}"),
}


@command
def main(argv: Sequence[str]) -> int:
    config = parse(SweepConfig, argv, prog="sweep.py")
    if config.resume is not None:
        _check_resume(config)
    from mechint.train.signals import Stopped
    from mechint.train.sweep import conclude, resume, start, train_members
    from mechint.train.sweep_record import open_sweep
    from mechint.train.sweep_share import check_slurm, join_ranks, n_ranks, run_share, submit

    if config.slurm:
        check_slurm()
    try:
        if n_ranks() > 1:
            if config.slurm:
                raise MechintError("--slurm submits jobs of its own: leave torchrun out")
            sweep, names = join_ranks(config)
            rows = run_share(sweep.path, names)
            sweep = open_sweep(sweep.path)
        else:
            sweep, activations = resume(config.resume) if config.resume is not None else start(config)
            if config.slurm and sweep.unfinished:
                jobs = submit(sweep, config)
                print(f"jobs: {' '.join(job.job_id for job in jobs)}; their logs are in {sweep.path / 'slurm'}")
                print(f"The last one writes {sweep.path / 'results.csv'}; for the figure, or to go on:")
                print(f"  {sweep.resume_command}")
                return 0
            print(f"sweep: {sweep.path}, {len(sweep.members)} members", flush=True)
            train_members(sweep, [member.name for member in sweep.members], activations, progress=sys.stderr.isatty())
            rows = conclude(sweep, activations, progress=sys.stderr.isatty())
    except Stopped as stopped:
        print(f"stopped; the states are saved. To go on: {stopped.command}", file=sys.stderr)
        return 130
    if rows is None:
        left = ", ".join(member.name for member in sweep.unfinished)
        print(f"still to be finished by other processes: {left}. If none runs any more: {sweep.resume_command}")
        return 0
    from mechint.report.frontier import frontier
    from mechint.report.style import save_figure

    notes = sweep.info.get("notes", [])
    save_figure(frontier(rows, note_text="; ".join(notes)), sweep.path / "frontier.png")
    print(table_text(rows))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for row in rows:
        if row["error"] is not None:
            print(f"failed: {row['member']}: {row['error']}", file=sys.stderr)
    print(f"results: {sweep.path / 'results.csv'}\nfigure: {sweep.path / 'frontier.png'}")
    return 2 if any(row["status"] == "failed" for row in rows) else 0


def _check_resume(config: SweepConfig) -> None:
    """Raise `MechintError` for flags beside --resume that would be ignored."""
    free = {"resume", "slurm", "slurm_jobs", "slurm_partition", "slurm_time", "slurm_gpus", "slurm_cpus"}
    default = SweepConfig()
    for name in SweepConfig.field_names():
        if name not in free and getattr(config, name) != getattr(default, name):
            raise MechintError(
                f"--{name.replace('_', '-')} beside --resume: a sweep goes on with the settings it has; leave the flag"
                " out, or start a new sweep"
            )


def table_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table for people: the done members by architecture and L0, a star at those that no other beats in both L0 and
    FVU, then the failed."""
    lines = [["member", *(heading for heading, _ in SHOWN.values()), ""]]
    for row in rows:
        cells = ["-" if row[name] is None else form.format(row[name]) for name, (_, form) in SHOWN.items()]
        mark = "*" if row["pareto"] else "" if row["status"] == "done" else str(row["status"])
        lines.append([row["member"], *cells, mark])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:-1], widths[1:-1], strict=True)), line[-1]]
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in text)
