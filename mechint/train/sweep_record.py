"""A sweep's folder: what was asked (sweep.json), how far each member is, and the table of what came out.

How far a member is follows from the files in its run directory, whichever process trained it: manifest.json is written
last, failed.json says why it could not go on. sweep.json repeats it for people.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mechint.config import SAETrainConfig
from mechint.config.sweep import AXES
from mechint.errors import MechintError, nearest
from mechint.locks import lock
from mechint.provenance import get_git_commit, make_dir, read_json, write_json, write_text
from mechint.runs import Run
from mechint.train.layout import Layout, run_layout
from mechint.train.state import has_state
from mechint.train.sweep_grid import Plan

SWEEP_VERSION = 1
SWEEP_JSON, RESULTS_CSV, FAILED_JSON, LANGUAGE_JSON = "sweep.json", "results.csv", "failed.json", "language.json"
LOCKS = ".locks"
# What the table takes from a member's summary.json and from its language.json.
SUMMARY_COLUMNS = ("l0", "fvu", "dead_features", "dead_fraction", "training_seconds")
LANGUAGE_COLUMNS = ("ce_recovered_zero", "ce_recovered_mean", "kl_clean_sae")
COLUMNS = (
    "member",
    *(axis for axis in AXES if axis != "d_sae"),
    "d_sae",
    "status",
    *SUMMARY_COLUMNS,
    *LANGUAGE_COLUMNS,
    "pareto",
    "error",
)


@dataclass(frozen=True)
class Member:
    """One SAE of a sweep: its settings and its run directory, which is there once it has started."""

    name: str
    values: dict[str, Any]  # its place on the axes that apply to its architecture
    config: SAETrainConfig
    layout: Layout

    @property
    def path(self) -> Path:
        return self.layout.root

    @property
    def error(self) -> str | None:
        """Why it failed, if it did."""
        path = self.path / FAILED_JSON
        return read_json(path, "record of a failure")["error"] if path.is_file() else None

    @property
    def status(self) -> str:
        """done, failed, unfinished (there is a state to go on from) or waiting."""
        if self.layout.manifest is not None and self.layout.manifest.is_file():
            return "done"
        if (self.path / FAILED_JSON).is_file():
            return "failed"
        return "unfinished" if has_state(self.layout.state) else "waiting"

    def claim(self) -> IO[str] | None:
        """An open lock file while nobody else holds it, else None; closing it, or the end of the process, lets go.

        Two processes on one member would write over each other's states. Where the file system has no locks, everybody
        gets one.
        """
        make_dir(self.path.parent / LOCKS)
        file = open(self.path.parent / LOCKS / self.name, "w")  # noqa: SIM115  (held beyond this call)
        if lock(file.fileno()) is False:
            file.close()
            return None
        return file

    def fail(self, error: str) -> None:
        """Record why the member cannot go on; `--resume` tries it again."""
        write_json(self.path / FAILED_JSON, {"error": error})


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder, opened."""

    path: Path
    info: dict[str, Any]  # what sweep.json says, less the members
    members: list[Member]

    @property
    def unfinished(self) -> list[Member]:
        """Members that may still change: neither done nor failed."""
        return [member for member in self.members if member.status in ("unfinished", "waiting")]

    @property
    def resume_command(self) -> str:
        return f"python scripts/sweep.py --resume {self.path}"


def make_sweep(path: Path, plans: list[Plan], info: dict[str, Any]) -> Sweep:
    """Make the folder of a new sweep and write its sweep.json. Raises `MechintError` if the name is taken."""
    try:
        make_dir(path.parent)
        path.mkdir()
    except FileExistsError:
        sweep = (path / SWEEP_JSON).is_file()
        go_on = f", or go on with it: python scripts/sweep.py --resume {path}" if sweep else ""
        raise MechintError(f"{path} exists: give the sweep another --name{go_on}") from None
    except OSError as error:
        raise MechintError(f"folder {path} cannot be made ({error.strerror}): give another --runs-root") from error
    members = [Member(plan.name, plan.values, plan.config, run_layout(path / plan.name)) for plan in plans]
    sweep = Sweep(path, {"sweep_version": SWEEP_VERSION, "git_commit": get_git_commit(), **info}, members)
    write_sweep(sweep)
    return sweep


def open_sweep(path: Path) -> Sweep:
    """The sweep in a folder. Raises `MechintError` if there is none, or one of a newer version."""
    if not (path / SWEEP_JSON).is_file():
        beside = sorted(p.parent.name for p in path.parent.glob(f"*/{SWEEP_JSON}"))
        known = f"; {nearest(path.name, beside)}" if beside else ""
        raise MechintError(f"{path} is not a sweep: it has no {SWEEP_JSON}{known}")
    info = read_json(path / SWEEP_JSON, "sweep")
    if not isinstance(info.get("sweep_version"), int) or info["sweep_version"] > SWEEP_VERSION:
        raise MechintError(f"{path / SWEEP_JSON} is of version {info.get('sweep_version')!r}: update mechint")
    base = info["base"]
    members = [
        Member(
            entry["name"],
            entry["values"],
            SAETrainConfig.from_dict({**base, **entry["settings"]}, source=f"{path / SWEEP_JSON}: {entry['name']}"),
            run_layout(path / entry["name"]),
        )
        for entry in info.pop("members")
    ]
    return Sweep(path, info, members)


def write_sweep(sweep: Sweep) -> None:
    """Write sweep.json as its members' files are now."""
    base = sweep.info["base"]
    members = []
    for member in sweep.members:
        settings = {key: value for key, value in member.config.to_dict().items() if base.get(key) != value}
        entry = {"name": member.name, "values": member.values, "settings": settings, "status": member.status}
        if (error := member.error) is not None:
            entry["error"] = error
        members.append(entry)
    write_json(sweep.path / SWEEP_JSON, {**sweep.info, "members": members})


def results(sweep: Sweep) -> list[dict[str, Any]]:
    """The table: a row a member under `COLUMNS`, the done ones by architecture and rising L0, then the others."""
    rows = [_row(member) for member in sweep.members]
    done = [row for row in rows if row["l0"] is not None and row["fvu"] is not None]
    for row in done:
        row["pareto"] = is_pareto(row, done)
    order = [row["architecture"] for row in rows]
    return sorted(
        rows,
        key=lambda row: (row["status"] != "done", order.index(row["architecture"]), row["l0"] or 0.0, row["member"]),
    )


def is_pareto(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether no other row has fewer active latents without leaving more variance unexplained, or the reverse."""
    return not any(
        other["l0"] <= row["l0"]
        and other["fvu"] <= row["fvu"]
        and (other["l0"] < row["l0"] or other["fvu"] < row["fvu"])
        for other in rows
    )


def _row(member: Member) -> dict[str, Any]:
    config = member.config
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"member": member.name, **member.values, "d_sae": config.num_features}
    row |= {"status": member.status, "error": member.error}
    if row["status"] == "done":
        summary = Run(member.path).summary
        row |= {name: summary.get(name) for name in SUMMARY_COLUMNS}
        if (member.path / LANGUAGE_JSON).is_file():
            language = read_json(member.path / LANGUAGE_JSON, "cross-entropy of a member")
            row |= {name: language.get(name) for name in LANGUAGE_COLUMNS}
    return row


def write_results(sweep: Sweep, rows: list[dict[str, Any]]) -> Path:
    """Write the table as results.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if row[name] is None else row[name] for name in COLUMNS} for row in rows)
    path = sweep.path / RESULTS_CSV
    write_text(path, text.getvalue())
    return path
