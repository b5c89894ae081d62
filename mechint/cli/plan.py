"""`mechint plan`: what `mechint train` with the same flags will take, and where it goes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechint.cli.flags import command, flag_given, parse, print_json
from mechint.config import SAETrainConfig, preset_values, require
from mechint.errors import MechintError


@dataclass(frozen=True)
class PlanFlags(SAETrainConfig):
    """Predict memory, disk and time of `mechint train` with the same flags, before it starts; refuse what cannot fit.

    Some real steps are timed on this machine. The activations need not exist: then give --activation-dim and --n-rows.
    """

    n_rows: int | None = None
    """Vectors to train on, where the activations do not exist yet; a million if not given."""
    expected_l0: float | None = None
    """Active latents a vector at the end, for ReLU, JumpReLU and gated SAEs; 64 (or --target-l0) if not given."""
    expected_dead: float | None = None
    """Share of dead latents, where --revive auxk gives them work; 0.02 for the memory and 0 for the time if not
    given."""
    seconds: float = 10.0
    """Time for the measurement, about; 0 leaves it out."""
    json: bool = False
    """Print JSON: bytes and seconds."""

    def check_width(self) -> None:
        """As in train, left to the config that is made once d_in is known."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.n_rows is None or self.n_rows > 0, f"--n-rows must be at least 1, got {self.n_rows}")
        require(self.expected_l0 is None or self.expected_l0 > 0, "--expected-l0 must be above 0")
        if self.expected_dead is not None:
            require(0 <= self.expected_dead <= 1, f"--expected-dead is a share, 0 to 1, got {self.expected_dead:g}")
        require(self.seconds >= 0, f"--seconds must not be negative, got {self.seconds:g}")


OWN = ("n_rows", "expected_l0", "expected_dead", "seconds", "json")


@command
def main(argv: Sequence[str]) -> int:
    flags = parse(PlanFlags, argv, prog="mechint plan", presets=preset_values, config_file=True)
    settings = {name: value for name, value in flags.to_dict().items() if name not in OWN}
    began = time.perf_counter()
    from mechint.data import open_activations
    from mechint.provenance import detect_device
    from mechint.train.plan import make_plan
    from mechint.train.resolve import resolve, split, without_unsaid

    width_given = flag_given(argv, "--activation-dim", "--d-in", "--config")
    if Path(flags.activations_path).exists():
        activations = open_activations(flags.activations_path)
        if not width_given:
            settings["activation_dim"] = activations.d_in
        config = resolve(SAETrainConfig.from_dict(settings), activations)
        split(config, activations)
        n_rows = activations.n_rows
    elif width_given:
        activations, n_rows = None, flags.n_rows or 1_000_000
        config = without_unsaid(SAETrainConfig.from_dict(settings | {"device": detect_device(flags.device)}))
    else:
        raise MechintError(
            f"activations not found: {flags.activations_path}; to plan without them, give --activation-dim and --n-rows"
        )
    plan = make_plan(
        config,
        activations,
        n_rows,
        seconds=flags.seconds,
        expected_l0=flags.expected_l0,
        expected_dead=flags.expected_dead,
        startup=since_process_start() or time.perf_counter() - began,
    )
    if flags.json:
        print_json(plan.to_dict())
    else:
        print("\n".join(table(plan, exists=activations is not None)))
    return 0


def since_process_start() -> float | None:
    """Seconds since this process began (imports included); None where the system does not say."""
    try:
        import os

        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return None


def table(plan: Any, *, exists: bool) -> list[str]:
    """The plan for people."""
    from mechint.train.plan import size

    config = plan.config
    lines = [
        f"{config.architecture}, {config.activation_dim:,} -> {config.num_features:,} latents, {config.steps:,} steps"
        f" of {config.batch_size:,} vectors on {config.device}, {plan.kernel} kernel; {plan.n_rows:,} rows"
    ]
    for place, free in zip(plan.memory, plan.available, strict=True):
        name = "RAM" if place.device == "cpu" else f"{place.device} memory"
        lines += ["", heading(name, place.peak, free, size)]
        fullest = place.fullest
        for part in fullest.parts:
            lines.append(f"    {part.name:<24}{size(part.n_bytes):>10}  {part.note}".rstrip())
        others = ", ".join(f"{phase.name} {size(phase.n_bytes)}" for phase in place.phases if phase is not fullest)
        lines.append(f"    the fullest moment is in: {fullest.name}; {others}")
        if place.mapped:
            lines.append(f"    and {size(place.mapped)} of activations, read through the page cache: no RAM of ours")
        lines.append(f"    {advice(fullest.name, config)}")
    disk = plan.disk
    lines += ["", heading("disk", disk.peak, plan.disk_free, size)]
    lines.append(
        f"    {'saved states':<24}{size(disk.state):>10}  each: weights and Adam; two are kept, a third written"
    )
    lines.append(
        f"    {'checkpoint.pt and sae/':<24}{size(2 * disk.checkpoint):>10}  what stays, with some small files"
    )
    if (speed := plan.speed) is not None:
        total, steps = plan.seconds, speed.steps(config)
        lines += ["", f"{'time':<28}{duration(total):>10}  {config.steps / steps:,.1f} steps a second"]
        if speed.step_at_start != speed.step_at_end:
            lines.append(f"    {'a step at first':<24}{milliseconds(speed.step_at_start)}  L0 {speed.l0_at_start:,.0f}")
        lines.append(f"    {'a step':<24}{milliseconds(speed.step_at_end)}  L0 {speed.l0_at_end:,.0f}")
        lines.append(f"    {'reading a batch':<24}{milliseconds(speed.read)}")
        before = plan.startup + speed.preparation
        rest = f"before {duration(before)}, states {duration(speed.saves(config))}, end {duration(speed.evaluation)}"
        lines.append(f"    {'beside the steps':<24}{duration(total - steps):>10}  {rest}")
        lines.append(f"    measured with {speed.measured}")
        lines.append(assumed(plan))
    if not exists:
        lines.append("    the activations do not exist yet: reading them was timed on made-up rows in RAM")
    return lines


def heading(name: str, needed: int, free: int | None, size: Any) -> str:
    there = "" if free is None else f"  of {size(free)}: fits"
    return f"{name:<28}{size(needed):>10}{there}"


def advice(phase: str, config: SAETrainConfig) -> str:
    """What makes the fullest moment smaller."""
    width = f"--{config.width_setting[0].replace('_', '-')}"
    return {
        "before": "fewer rows make it smaller",
        "start": "it is short, does not grow with --batch-size, and is given back before the first step",
        "steps": f"a smaller --batch-size or {width} makes it smaller in proportion",
        "end": f"a smaller --eval-batch-size (now {config.eval_batch_size}) or {width} makes it smaller",
    }[phase]


def assumed(plan: Any) -> str:
    """What the time rests on, beside the measurement."""
    from mechint.train.plan_time import fall_steps

    speed, config = plan.speed, plan.config
    dead = f"; {plan.expected_dead:.0%} of latents are dead (--expected-dead)" if config.revive == "auxk" else ""
    if speed.step_at_start == speed.step_at_end:
        return f"    assumed: steps cost the same throughout{dead}"
    fall = fall_steps(config)
    unfinished = f" (one and a half warm-ups; of which {config.steps:,} are made)" if fall > config.steps else ""
    return (
        f"    assumed: L0 falls from {speed.l0_at_start:,.0f} to {speed.l0_at_end:,.0f} (--expected-l0) in the first"
        f" {fall:,} steps{unfinished}, evenly on a log scale{dead}"
    )


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:>7,.1f} ms"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
